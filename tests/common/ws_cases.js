// The `ws` package on both sides of the proxy: `serve` listens and prints its port; `check PORT` runs every case.
'use strict';
const assert = require('assert');
const { createHash } = require('crypto');
const { WebSocket, WebSocketServer } = require('ws');

const hash = (data) => createHash('sha256').update(data).digest('hex');

function serve() {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1', perMessageDeflate: { threshold: 0 } });
  server.on('listening', () => console.log(`listens on ${server.address().port}`));
  server.on('connection', (socket, request) => {
    socket.on('error', () => {});
    if (request.url === '/fragments') {
      // A message in three frames, with a ping between them.
      socket.send('one ', { fin: false });
      socket.ping('between');
      socket.send('two ', { fin: false });
      socket.send('three', { fin: true });
    }
    if (request.url.startsWith('/close/')) socket.close(Number(request.url.slice(7)), 'as asked');
    socket.on('message', (data, binary) => socket.send(data, { binary }));
  });
}

const open = (port, path, options) => new WebSocket(`ws://127.0.0.1:${port}${path}`, options);
const once = (socket, event) =>
  new Promise((resolve, reject) => {
    socket.once(event, (...values) => resolve(values));
    socket.once('error', reject);
  });

async function echo(port, data, options, send) {
  const socket = open(port, '/', options);
  await once(socket, 'open');
  const back = once(socket, 'message');
  socket.send(data, send);
  const [got] = await back;
  assert.equal(hash(got), hash(data));
  const compressed = socket.extensions.includes('permessage-deflate');
  assert.equal(compressed, options.perMessageDeflate !== false, 'what was agreed on');
  socket.close(1000, 'done');
  const [code] = await once(socket, 'close');
  assert.equal(code, 1000);
}

const cases = {
  'text': (port) => echo(port, 'hello', { perMessageDeflate: false }),
  'deflate': (port) => echo(port, 'hello '.repeat(10000), { perMessageDeflate: { threshold: 0 } }),
  'binary of 16 MB': (port) => echo(port, Buffer.alloc(16 << 20, 'abc'), { perMessageDeflate: false }),
  'deflated binary of 8 MB': (port) => echo(port, Buffer.alloc(8 << 20, 'abcdef'), { perMessageDeflate: { threshold: 0 } }),
  'empty message': (port) => echo(port, Buffer.alloc(0), { perMessageDeflate: false }),
  'fragments from the client': async (port) => {
    const socket = open(port, '/', { perMessageDeflate: false });
    await once(socket, 'open');
    const back = once(socket, 'message');
    for (let n = 0; n < 50; n++) socket.send(`part ${n} `, { fin: false });
    socket.send('end', { fin: true });
    const [got] = await back;
    assert.ok(String(got).startsWith('part 0 part 1 ') && String(got).endsWith('part 49 end'));
    socket.terminate();
  },
  'fragments from the app, with a ping between': async (port) => {
    const socket = open(port, '/fragments', { perMessageDeflate: false });
    const [message, ping] = [once(socket, 'message'), once(socket, 'ping')];
    assert.equal(String((await ping)[0]), 'between');
    assert.equal(String((await message)[0]), 'one two three');
    socket.terminate();
  },
  'ping and pong': async (port) => {
    const socket = open(port, '/');
    await once(socket, 'open');
    const pong = once(socket, 'pong');
    socket.ping('are you there');
    assert.equal(String((await pong)[0]), 'are you there');
    socket.terminate();
  },
};
for (const code of [1000, 1001, 1008, 1011, 3000, 4999]) {
  cases[`close ${code}`] = async (port) => {
    const [got, why] = await once(open(port, `/close/${code}`), 'close');
    assert.deepEqual([got, String(why)], [code, 'as asked']);
  };
}

async function check(port) {
  for (const [name, run] of Object.entries(cases)) {
    await run(port);
    console.log(`passed: ${name}`);
  }
  console.log(`all ${Object.keys(cases).length} passed`);
  process.exit(0);
}

const [, , what, port] = process.argv;
if (what === 'serve') serve();
else check(port).catch((error) => { console.error(error); process.exit(1); });
