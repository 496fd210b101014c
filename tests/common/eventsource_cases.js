// An Express app that compresses its events with the `compression` package, as many do, and the `eventsource` package.
// `serve`, or `listen PORT`, which ends after it was disconnected once and has received every event up to 40.

const [, , what, port] = process.argv;

function serve() {
  const express = require('express');
  const app = express();
  app.use(require('compression')());
  app.get('/events', (req, res) => {
    res.set({ 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' });
    let id = Number(req.headers['last-event-id'] ?? 0);
    const sending = setInterval(() => {
      if (id < 40) res.write(`id: ${++id}\ndata: event number ${id}\n\n`);
      res.flush();
    }, 120);
    res.on('close', () => clearInterval(sending));
  });
  const server = app.listen(0, '127.0.0.1', () => console.log(`listens on ${server.address().port}`));
}

async function listen() {
  const { EventSource } = await import(require.resolve('eventsource').replace('index.cjs', 'index.js'));
  let [encoding, last, errors] = ['', 0, 0];
  const fetching = async (url, init) => {
    const answer = await fetch(url, init);
    encoding = answer.headers.get('content-encoding');
    return answer;
  };
  const source = new EventSource(`http://127.0.0.1:${port}/events`, { fetch: fetching });
  source.onerror = (error) => { errors++; console.log(`error: ${error.message}`); };
  source.onmessage = ({ lastEventId }) => {
    if (Number(lastEventId) !== ++last) throw new Error(`event ${lastEventId} instead of ${last}`);
    console.log(`event ${last} by ${encoding}`);
    if (last === 40 && errors > 0) process.exit(0);
  };
}

if (what === 'serve') serve();
else listen();
