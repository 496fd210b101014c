// A plain Node HTTP/2 client: requests each path over one session; with --again, the first one repeatedly, on a new
// session after each GOAWAY. Prints one line per event.
//
//   node http2-client.js http://HOST:PORT [--again] PATH...

const http2 = require('node:http2');

const [url, ...args] = process.argv.slice(2);
const again = args[0] === '--again';
const paths = again ? args.slice(1) : args;
let session;
let told;
let asked = 0;
let done = 0;

function connect() {
  const own = (session = http2.connect(url));
  told = false;
  own.on('goaway', (code, last) => {
    if (own === session) told = true;
    console.log(`goaway ${code} ${last >>> 0}`);
  });
  own.on('error', (error) => console.log(`session error ${error.code}`));
  own.on('close', () => console.log('session closed'));
}

function ask(path, then) {
  asked += 1;
  const stream = session.request({ ':path': path });
  let status;
  let bytes = 0;
  stream.on('response', (headers) => (status = headers[':status']));
  stream.on('data', (data) => (bytes += data.length));
  stream.on('error', (error) => {
    // Node refuses to send the request: the GOAWAY has arrived, but its event has not been emitted yet.
    if (error.code === 'ERR_HTTP2_GOAWAY_SESSION') {
      asked -= 1;
      told = true;
    } else console.log(`stream error ${error.code}`);
  });
  stream.on('close', () => {
    if (stream.rstCode === 0) done += 1;
    if (!again) console.log(`answer ${path} ${status} ${bytes} ${stream.rstCode}`);
    then?.();
  });
}

let stopped = false;
function loop() {
  if (stopped) {
    console.log(`stopped ${asked} ${done}`);
    return session.close();
  }
  if (told || session.closed) connect();
  ask(paths[0], loop);
}

connect();
if (again) {
  process.on('SIGINT', () => (stopped = true));
  for (let n = 0; n < 8; n++) loop();
} else {
  for (const path of paths) ask(path);
}
