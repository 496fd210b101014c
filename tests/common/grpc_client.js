'use strict';
// A gRPC client in plain Node. `node grpc_client.js ADDR PATH [MESSAGE...]` makes one call and prints the results line
// by line. SIGUSR2 cancels the call; without a message the request stays open.

const http2 = require('node:http2');

const [addr, path, ...messages] = process.argv.slice(2);

const session = http2.connect(`http://${addr}`);
session.on('goaway', (code, last) => console.log(`goaway ${code} ${last}`));
session.on('error', (error) => console.log(`session error ${error.code}`));
session.on('close', () => console.log('session closed'));

const call = session.request({
  ':method': 'POST',
  ':path': path,
  'content-type': 'application/grpc',
  te: 'trailers',
  'grpc-timeout': '1H',
});
for (const text of messages) {
  const prefix = Buffer.alloc(5);
  prefix.writeUInt32BE(Buffer.byteLength(text), 1);
  call.write(Buffer.concat([prefix, Buffer.from(text)]));
}
if (messages.length > 0) call.end();
process.on('SIGUSR2', () => call.close(http2.constants.NGHTTP2_CANCEL));

call.on('response', (fields, flags) => {
  const only = (flags & http2.constants.NGHTTP2_FLAG_END_STREAM) !== 0;
  console.log(`${only ? 'trailers-only' : 'head'} ${JSON.stringify(fields)}`);
});
call.on('data', (bytes) => console.log(`data ${JSON.stringify(bytes.subarray(5).toString())}`));
call.on('trailers', (fields) => console.log(`trailers ${JSON.stringify(fields)}`));
call.on('error', () => {});
call.on('close', () => {
  console.log(`end ${call.rstCode}`);
  session.close();
});
