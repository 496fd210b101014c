// A small chat room: Express for the page and the history, ws for the messages.
// It does not handle signals: on its own it dies at SIGTERM, and every socket drops.
//
//   npm ci && PORT=3000 node server.js

const http = require('node:http');
const path = require('node:path');
const express = require('express');
const { WebSocket, WebSocketServer } = require('ws');

const app = express();
const server = http.createServer(app);
const sockets = new WebSocketServer({ server, path: '/chat', maxPayload: 4096 });
const history = [];

app.get('/', (req, res) => res.sendFile(path.join(__dirname, 'index.html')));
app.get('/history', (req, res) => res.json(history));

function say(name, text) {
  const message = { at: new Date().toISOString(), name, text };
  history.push(message);
  if (history.length > 100) history.shift();
  for (const socket of sockets.clients) {
    if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
  }
}

sockets.on('connection', (socket, req) => {
  const name = (new URL(req.url, 'http://app').searchParams.get('name') || 'somebody').slice(0, 32);
  say(name, 'joined');
  socket.on('message', (data) => say(name, data.toString()));
  socket.on('error', () => {}); // 'close' follows
  socket.on('close', (code) => {
    console.log(`${name} left with code ${code}`);
    say(name, 'left');
  });
});

server.listen(process.env.PORT || 3000, () => {
  console.log(`chat app: pid ${process.pid} listens on port ${server.address().port}`);
});
