// Cost of the preload at the start of `node server.js` as PID 1: CPU time until it listens, and memory then.
// Run: node benches/preload.js [rounds]. Each round starts Node once with and once without it; prints medians, and the
// median of the differences per round.

const { spawnSync } = require('child_process');
const path = require('path');

const server = `require('http').createServer(() => {}).listen(0, () => {
  const { user, system } = process.cpuUsage();
  console.log(JSON.stringify({ ms: (user + system) / 1000, kib: process.memoryUsage().rss / 1024 }));
  process.exit();
})`;
const asRoot = process.getuid() === 0 ? [] : ['--user', '--map-root-user'];

function start(options) {
  const command = [...asRoot, '--pid', '--fork', '--mount-proc', process.execPath, '-e', server];
  const { stdout, stderr } = spawnSync('unshare', command, { env: { ...process.env, NODE_OPTIONS: options } });
  if (stdout.length === 0) throw new Error(String(stderr));
  return JSON.parse(stdout);
}

const median = (numbers) => numbers.sort((a, b) => a - b)[numbers.length >> 1].toFixed(1);
const rounds = Number(process.argv[2] || 41);
const preload = `--require ${path.resolve(__dirname, '../src/inject/preload.js')}`;
const pairs = Array.from({ length: rounds }, () => [start(''), start(preload)]);

for (const unit of ['ms', 'kib']) {
  const of = (pick) => median(pairs.map(([without, loaded]) => pick(without[unit], loaded[unit])));
  console.log(`${process.version} ${unit}: without ${of((a) => a)}, with ${of((_, b) => b)}, added ${of((a, b) => b - a)}`);
}
