// An app whose responses wait until the test sends `GET /release`, so that a test decides what happens in which phase.

const http = require('node:http');
const zlib = require('node:zlib');

let waiting = [];
const released = () => new Promise((resolve) => waiting.push(resolve));

const server = http.createServer(async (req, res) => {
  switch (req.url) {
    case '/release':
      waiting.forEach((resolve) => resolve());
      waiting = [];
      return res.end();
    case '/active-requests':
      return res.end(JSON.stringify({ active: waiting.length }));
    case '/full': // each new connection is closed at once from now on
      server.maxConnections = 1;
      return res.end();
    case '/roomy':
      server.maxConnections = Infinity;
      return res.end();
    case '/wait':
      await released();
      return res.end('released\n');
    case '/stream': // chunked, or, for an HTTP/1.0 client, up to the end of the connection
      res.write('first\n');
      await released();
      return res.end('last\n');
    case '/sized':
      res.writeHead(200, { 'Content-Length': 11 }).write('first\n');
      await released();
      return res.end('last\n');
    case '/events': // one event and a half
      res.writeHead(200, { 'Content-Type': 'text/event-stream' }).write('id: 1\ndata: whole\n\nid: 2\ndata: ha');
      await released();
      return res.end('lf\n\n');
    case '/gzip-events': // one event, and another after the release
    case '/busy-gzip-events': { // one every few milliseconds
      res.writeHead(200, { 'Content-Type': 'text/event-stream', 'Content-Encoding': 'gzip' });
      const gzip = zlib.createGzip();
      gzip.pipe(res);
      const send = (id) => { gzip.write(`id: ${id}\ndata: whole\n\n`); gzip.flush(); };
      send(1);
      if (req.url === '/busy-gzip-events') return setInterval(send, 10, 2);
      await released();
      return send(2);
    }
    case '/coded-events':
      res.writeHead(200, { 'Content-Type': 'text/event-stream', 'Content-Encoding': req.headers['x-coding'] });
      return res.write('id: 1\ndata: whole\n\n');
    default:
      return res.end(`hello from pid ${process.pid}\n`);
  }
});

server.on('upgrade', async (req, socket) => {
  const accept = require('node:crypto').createHash('sha1')
    .update(`${req.headers['sec-websocket-key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest('base64');
  const head = `HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`;
  socket.on('error', () => {});
  socket.on('data', (data) => console.log(`socket got ${data.toString('hex')}`));
  if (req.url === '/late-handshake') {
    await released();
    socket.write(head);
  } else if (req.url === '/big-frame') { // 24 MiB in one frame, more than all buffers on the way can hold
    const size = Buffer.alloc(10, 0);
    size.writeUInt16BE(0x827f);
    size.writeUInt32BE(24 << 20, 6);
    socket.write(Buffer.concat([Buffer.from(head), size, Buffer.alloc(24 << 20, 'x')]));
  } else if (req.url === '/fragments') { // one message in two frames
    socket.write(Buffer.concat([Buffer.from(head), Buffer.from([0x01, 5]), Buffer.from('first')]));
    await released();
    socket.write(Buffer.concat([Buffer.from([0x80, 5]), Buffer.from('-last')]));
  } else { // '/half-frame': a text frame of ten bytes, of which four are sent now
    socket.write(Buffer.concat([Buffer.from(head), Buffer.from([0x81, 10]), Buffer.from('half')]));
    await released();
    socket.write('-whole');
  }
});

server.listen(process.env.PORT, '127.0.0.1', () => {
  console.log(`held app: pid ${process.pid} listens on port ${server.address().port}`);
});
