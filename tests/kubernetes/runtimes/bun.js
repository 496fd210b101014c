import fetch from './fetch.js';

Bun.serve({ port: 8080, idleTimeout: 60, fetch });
