// Long polling as in engine.io (protocol 4: https://socket.io/docs/v4/engine-io-protocol/), and a generic variant.
//
// Sessions live in this process. A session's waiting GET is answered when a client posts a message; its end is printed.

const http = require('node:http');

const sessions = new Map(); // by sid: the waiting response, if there is one
const waiting = [];

const server = http.createServer((req, res) => {
  const { pathname, searchParams } = new URL(req.url, 'http://app');
  if (pathname === '/poll') { // waits forever, or until GET /news
    waiting.push(res);
    res.once('close', () => console.log(`poll ${res.writableEnded ? 'answered' : 'left'}`));
    return console.log('poll waits');
  }
  if (pathname === '/news') {
    waiting.splice(0).forEach((poll) => poll.end('news'));
    return res.end();
  }
  if (searchParams.get('transport') !== 'polling') return res.end(`hello from pid ${process.pid}\n`);
  const sid = searchParams.get('sid');
  res.setHeader('Content-Type', 'text/plain; charset=UTF-8');
  if (sid === null) {
    const begun = `s${sessions.size + 1}`;
    sessions.set(begun, null);
    return res.end(`0${JSON.stringify({ sid: begun, upgrades: [], pingInterval: 25000, pingTimeout: 20000, maxPayload: 1e6 })}`);
  }
  if (!sessions.has(sid)) {
    res.statusCode = 400;
    return res.end('{"code":1,"message":"Session ID unknown"}');
  }
  if (req.method === 'POST') {
    let body = '';
    req.on('data', (data) => { body += data; });
    return req.on('end', () => {
      res.end('ok');
      sessions.get(sid)?.end(body);
      console.log(`session ${sid} got ${body}`);
    });
  }
  sessions.set(sid, res);
  res.once('close', () => {
    if (res.writableEnded) return sessions.set(sid, null);
    sessions.delete(sid);
    console.log(`session ${sid} is over`);
  });
  console.log(`session ${sid} waits`);
});

server.listen(process.env.PORT, '127.0.0.1', () => {
  console.log(`polling app: pid ${process.pid} listens on port ${server.address().port}`);
});
