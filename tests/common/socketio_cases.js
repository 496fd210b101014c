// socket.io on both sides, by long polling only: `serve`; `wait PORT`, which sends nothing; or `talk PORT`, which sends
// numbers until SIGINT, repeats each until it is confirmed, and ends once all are.

const [, , what, port] = process.argv;

function serve() {
  const server = require('node:http').createServer();
  const { Server } = require('socket.io');
  new Server(server, { transports: ['polling'] }).on('connection', (socket) => {
    socket.on('number', (number, confirm) => confirm(number));
    socket.on('disconnect', (reason) => console.log(`server: disconnect: ${reason}`));
  });
  server.listen(0, '127.0.0.1', () => console.log(`listens on ${server.address().port}`));
}

function talk() {
  const { io } = require('socket.io-client');
  const socket = io(`http://127.0.0.1:${port}`, {
    transports: ['polling'], reconnectionDelay: 200, reconnectionDelayMax: 200, retries: 50, ackTimeout: 1000,
  });
  socket.on('connect', () => console.log('client: connect'));
  socket.on('disconnect', (reason) => console.log(`client: disconnect: ${reason}`));
  if (what === 'wait') return;
  const open = new Set();
  let last = 0;
  const endIfConfirmed = () => { if (!sending && open.size === 0) process.exit(0); };
  let sending = setInterval(() => {
    const number = ++last;
    open.add(number);
    socket.emit('number', number, (error, confirmed) => {
      open.delete(confirmed);
      if (number === 1) console.log('client: confirmed');
      endIfConfirmed();
    });
  }, 250);
  process.on('SIGINT', () => {
    sending = clearInterval(sending);
    endIfConfirmed();
  });
}

if (what === 'serve') serve();
else talk();
