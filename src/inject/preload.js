'use strict';
// Loaded by NODE_OPTIONS=--require. The kernel drops a signal to a container's PID 1 unless the program handles it, so
// a plain `node server.js` would sit out its whole grace. This lets it end at SIGTERM as it would under any other
// number. It does nothing in other processes and worker threads, nor when the app handles SIGTERM itself.
const isMainThread = () => {
  try {
    return require('worker_threads').isMainThread;
  } catch (none) {
    return true; // Node 10 and older
  }
};
if (process.pid === 1 && isMainThread()) {
  const SIGTERM = 'SIGTERM';
  const exit = () => process.exit(128 + 15);
  const deaf = () => process.listenerCount(SIGTERM) === 0;

  const onTerm = () => {
    // Out of the way while the app's own handlers run: some count the listeners to learn whether they are alone.
    process.removeListener(SIGTERM, onTerm);
    if (deaf()) return exit();
    setImmediate(() => process.prependListener(SIGTERM, onTerm));
  };
  process.on(SIGTERM, onTerm);

  // Having cleaned up, such handlers take themselves out and send the signal again, to end by it.
  const kill = process.kill;
  process.kill = function (pid, signal) {
    const again = pid === process.pid && (signal === undefined || signal === SIGTERM || signal === 15);
    if (again && process.listeners(SIGTERM).every((listener) => listener === onTerm)) exit();
    return Reflect.apply(kill, this, arguments);
  };
}
