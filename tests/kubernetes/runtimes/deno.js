import answer from './fetch.js';

Deno.serve({ port: 8080 }, answer);
