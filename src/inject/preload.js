'use strict';
// Loaded by NODE_OPTIONS=--require. The kernel discards a signal to a container's PID 1 unless the program handles it,
// so a plain `node server.js` would run until SIGKILL. This file makes it exit at SIGTERM as it would under any other
// pid. It does nothing in other processes and worker threads, or if the app handles SIGTERM itself.
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
    // Removed while the app's own handlers run: some count the listeners to find out whether they are the only one.
    process.removeListener(SIGTERM, onTerm);
    if (deaf()) return exit();
    setImmediate(() => process.prependListener(SIGTERM, onTerm));
  };
  process.on(SIGTERM, onTerm);

  // After cleaning up, such handlers remove themselves and send the signal again, to be killed by it.
  const kill = process.kill;
  process.kill = function (pid, signal) {
    const again = pid === process.pid && (signal === undefined || signal === SIGTERM || signal === 15);
    if (again && process.listeners(SIGTERM).every((listener) => listener === onTerm)) exit();
    return Reflect.apply(kill, this, arguments);
  };
}
