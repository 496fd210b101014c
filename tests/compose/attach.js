// Preloaded into the slow app: adds a WebSocket at /chat that echoes every message.

const http = require('node:http');
const { WebSocketServer } = require('ws');

const { createServer } = http;
http.createServer = (...args) => {
  const server = createServer(...args);
  new WebSocketServer({ server, path: '/chat' }).on('connection', (socket) => {
    socket.on('error', () => {}); // 'close' follows
    socket.on('message', (data) => socket.send(data.toString()));
  });
  return server;
};
