// A plain Node app with slow responses, to run behind lameduck.
// It does not handle signals: on its own it dies at SIGTERM with its requests running.
//
//   PORT=3000 node server.js

const http = require('node:http');
const { createHash } = require('node:crypto');
const { setTimeout: sleep } = require('node:timers/promises');
const { pipeline } = require('node:stream/promises');

const text = { 'Content-Type': 'text/plain; charset=utf-8' };
const block = Buffer.alloc(64 * 1024, 'abcdefghijklmnopqrstuvwxyz012345');
let active = 0;

const routes = {
  'GET /': (req, res) => res.writeHead(200, text).end(`hello from pid ${process.pid}\n`),

  // Responds after ?ms=.
  'GET /slow': async (req, res, { ms = 2000 }) => {
    await sleep(ms);
    res.writeHead(200, text).end(`done after ${ms} ms\n`);
  },

  // ?n= lines, one every ?ms=.
  'GET /stream': async (req, res, { n = 10, ms = 300 }) => {
    res.writeHead(200, text);
    for (let i = 1; i <= n && !res.destroyed; i++) {
      res.write(`line ${i} of ${n}\n`);
      await sleep(ms);
    }
    res.end();
  },

  // Server-sent events, one every ?ms=, without end. Each is sent in two parts, as a busy app's may be.
  'GET /events': async (req, res, { ms = 500 }) => {
    res.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-store' });
    for (let id = Number(req.headers['last-event-id'] ?? 0) + 1; !res.destroyed; id++) {
      res.write(`id: ${id}\ndata: event `);
      await sleep(ms / 2);
      res.write(`number ${id}\n\n`);
      await sleep(ms / 2);
    }
  },

  // Reads the body; responds with its length and SHA-256.
  'POST /upload': async (req, res) => {
    const hash = createHash('sha256');
    let bytes = 0;
    for await (const chunk of req) {
      bytes += chunk.length;
      hash.update(chunk);
    }
    json(res, { bytes, sha256: hash.digest('hex') });
  },

  // ?bytes= of the same 32 letters repeated, no faster than the client reads.
  'GET /download': async (req, res, { bytes = 1e6 }) => {
    res.writeHead(200, { 'Content-Type': 'application/octet-stream', 'Content-Length': bytes });
    if (req.method === 'HEAD') return res.end();
    await pipeline(function* () {
      for (let left = bytes; left > 0; left -= block.length) yield left < block.length ? block.subarray(0, left) : block;
    }, res);
  },

  // Responds before the body has arrived.
  'POST /early': (req, res) => res.writeHead(413, text).end('too large\n'),

  // Echoes the body as it arrives.
  'POST /echo': (req, res) => pipeline(req, res),

  // Never responds.
  'GET /hang': () => {},

  'GET /active-requests': (req, res) => json(res, { active: active - 1 }),

  'GET /crash': () => process.exit(1),

  // 103 Early Hints, then the response.
  'GET /hints': (req, res) => {
    res.writeEarlyHints({ link: '</style.css>; rel=preload; as=style' });
    res.writeHead(200, text).end('hinted\n');
  },

  // A chunked response with a trailer.
  'GET /trailers': (req, res) => {
    res.writeHead(200, { ...text, Trailer: 'X-Checksum' });
    res.write('body\n');
    res.addTrailers({ 'X-Checksum': createHash('sha256').update('body\n').digest('hex') });
    res.end();
  },

  // Returns the request's header lines as received; the response has oddly cased and repeated ones.
  'GET /headers': (req, res) => {
    const odd = ['X-oDD-cASE', 'kept', 'X-Repeated', 'one', 'x-repeated', 'two', 'Set-Cookie', 'a=1', 'Set-Cookie', 'b=2'];
    res.writeHead(200, ['Content-Type', 'application/json', ...odd]).end(JSON.stringify(req.rawHeaders));
  },

  // A response without a body: 204, or 304 with ?status=304.
  'GET /empty': (req, res, { status = 204 }) => res.writeHead(status, { ETag: '"1"' }).end(),
};

function json(res, value) {
  res.writeHead(200, { 'Content-Type': 'application/json' }).end(`${JSON.stringify(value)}\n`);
}

const server = http.createServer(async (req, res) => {
  active++;
  res.once('close', () => active--);
  const { pathname, searchParams } = new URL(req.url, 'http://app');
  const route = routes[`${req.method === 'HEAD' ? 'GET' : req.method} ${pathname}`];
  const query = Object.fromEntries([...searchParams].map(([name, value]) => [name, Number(value)]));
  try {
    if (route) await route(req, res, query);
    else res.writeHead(404, text).end('not found\n');
  } catch {
    res.destroy(); // the client went away
  }
});

server.listen(process.env.PORT || 3000, () => {
  console.log(`slow app: pid ${process.pid} listens on port ${server.address().port}`);
});
