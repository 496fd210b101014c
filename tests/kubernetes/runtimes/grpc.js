// The slow app on port 3000, and a gRPC server on port 50051 that answers every call after a moment.
const http2 = require('node:http2');
const { setTimeout: sleep } = require('node:timers/promises');

require('/slow/server.js');

http2.createServer().on('stream', async (stream) => {
  stream.on('error', () => {});
  await sleep(Math.random() * 500);
  if (stream.destroyed) return;
  stream.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
  stream.on('wantTrailers', () => stream.sendTrailers({ 'grpc-status': '0' }));
  stream.end(Buffer.alloc(5)); // an empty message
}).listen(50051);
