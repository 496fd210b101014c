// A plain Node service that calls another one: it forwards every request to BACKEND over kept-alive connections and
// returns the response. Like the slow app, it does not handle signals, and it retries nothing.
//
//   BACKEND=http://127.0.0.1:3001 PORT=3000 node server.js

const http = require('node:http');
const { pipeline } = require('node:stream');

const agent = new http.Agent({ keepAlive: true });

// Hop-by-hop fields are not forwarded.
function passOn({ connection, 'keep-alive': keepAlive, ...headers }) {
  return headers;
}

const server = http.createServer((req, res) => {
  const options = { agent, method: req.method, headers: passOn(req.headers) };
  const call = http.request(new URL(req.url, process.env.BACKEND), options, (answer) => {
    res.writeHead(answer.statusCode, passOn(answer.headers));
    pipeline(answer, res, () => {});
  });
  call.once('error', (error) => {
    if (res.headersSent) return res.destroy();
    res.writeHead(502, { 'Content-Type': 'text/plain; charset=utf-8' }).end(`${process.env.BACKEND}: ${error.message}\n`);
  });
  pipeline(req, call, () => {});
  res.once('close', () => res.writableFinished || call.destroy());
});

server.listen(process.env.PORT || 3000, () => {
  console.log(`front: pid ${process.pid} listens on port ${server.address().port}`);
});
