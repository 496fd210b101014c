// The slow app in two worker processes that share its port.
const cluster = require('node:cluster');

if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
} else {
  require('/slow/server.js');
}
