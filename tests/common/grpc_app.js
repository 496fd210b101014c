'use strict';
// A gRPC app in plain Node: HTTP/2 without TLS, messages with a five-byte prefix. The path of a call selects what it
// does; what happens is printed line by line.

const http2 = require('node:http2');

/** One message, not compressed (PROTOCOL-HTTP2.md, Length-Prefixed-Message). */
function message(text) {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt32BE(Buffer.byteLength(text), 1);
  return Buffer.concat([prefix, Buffer.from(text)]);
}

const HEAD = { ':status': 200, 'content-type': 'application/grpc+proto' };
let turnedAway = 0;
let calls = 0;

const CALLS = {
  // Echoes the request, and returns its fields.
  '/t.T/Unary': (stream, fields) => {
    const parts = [];
    stream.on('data', (part) => parts.push(part));
    stream.on('end', () => {
      stream.respond({ ...HEAD, 'x-seen': JSON.stringify(fields) }, { waitForTrailers: true });
      stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0', 'x-last': 'word' }));
      stream.end(Buffer.concat(parts));
    });
  },
  // Echoes every message at once; ends when the client does.
  '/t.T/Chat': (stream) => {
    stream.respond(HEAD, { waitForTrailers: true });
    stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
    stream.pipe(stream);
  },
  // One message, without an end.
  '/t.T/Watch': (stream) => {
    stream.respond(HEAD);
    stream.write(message('first'));
  },
  '/t.T/Hang': () => {},
  '/t.T/Reset': (stream) => stream.close(http2.constants.NGHTTP2_ENHANCE_YOUR_CALM),
  // The first call gets a GOAWAY with a lower last stream: the app did not process it.
  '/t.T/Away': (stream, fields) => {
    turnedAway += 1;
    if (turnedAway === 1) return stream.session.goaway(0, stream.id - 2);
    return CALLS['/t.T/Unary'](stream, fields);
  },
  '/t.T/Refuse': (stream, fields) => {
    turnedAway += 1;
    if (turnedAway === 1) return stream.close(http2.constants.NGHTTP2_REFUSED_STREAM);
    return CALLS['/t.T/Unary'](stream, fields);
  },
};

const server = http2.createServer({
  settings: { maxConcurrentStreams: Number(process.env.STREAMS || 100) },
});
server.on('session', (session) => {
  console.log('session opened');
  session.on('close', () => console.log('session closed'));
  session.on('error', () => {});
});
server.on('stream', (stream, fields) => {
  const path = fields[':path'];
  calls += 1;
  console.log(`call ${path}`);
  stream.on('error', () => {});
  stream.on('close', () => console.log(`end ${path} ${stream.rstCode}`));
  const call = CALLS[path];
  if (call) return call(stream, fields);
  // Not gRPC: returns the request as text.
  if (fields.expect === '100-continue') stream.additionalHeaders({ ':status': 100 });
  const parts = [];
  stream.on('data', (part) => parts.push(part));
  let trailers = {};
  stream.on('trailers', (came) => { trailers = { ...came }; });
  return stream.on('end', () => {
    if (fields[':method'] === 'HEAD') return stream.respond({ 'content-length': 9 }, { endStream: true });
    if (path === '/events') {
      stream.respond({ ':status': 200, 'content-type': 'text/event-stream' });
      const events = setInterval(() => stream.write('data: tick\n\n'), 50);
      return stream.on('close', () => clearInterval(events));
    }
    if (path === '/empty') return stream.respond({ ':status': 204 }, { endStream: true });
    if (path === '/nothing') return stream.respond({ ':status': 200 }, { endStream: true });
    stream.respond({ 'content-type': 'application/json' }, { waitForTrailers: true });
    stream.on('wantTrailers', () => stream.sendTrailers({ 'x-calls': String(calls) }));
    return stream.end(JSON.stringify({ fields, trailers, body: Buffer.concat(parts).toString() }));
  });
});
server.listen(Number(process.env.PORT || 0), '127.0.0.1', () => {
  console.log(`the gRPC app listens on port ${server.address().port}`);
});
