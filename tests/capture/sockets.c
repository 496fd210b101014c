/* Binds sockets as its arguments say, each by a thread of its own, and prints what came of it.
 *
 * KIND,ADDRESS,PORT[,OPTION...]: KIND is tcp4, tcp6, udp4, udp6, mptcp or unix (ADDRESS is a path, PORT ignored).
 * Options: listen, reuseaddr, reuseport, v6only, freebind, device=NAME, len=N (the address's length), null, unmapped,
 * edge and early (the address ends where its page does, or begins before it), closed and pipe (what the descriptor is), fork (in a child),
 * exec (its descriptor is passed to a new program, which prints its name), connect=PORT (to 127.0.0.1, first).
 * `hold` as the last argument: waits for ever.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
/* An error number that no call gives, to see whether one changes it. */
#define UNTOUCHED 4242

static const char *self;

static const char *name(int fd, char *to) {
  struct sockaddr_storage addr;
  socklen_t len = sizeof addr;
  char text[INET6_ADDRSTRLEN] = "";
  if (getsockname(fd, (void *)&addr, &len)) return "none";
  if (addr.ss_family == AF_INET) {
    struct sockaddr_in *in = (void *)&addr;
    sprintf(to, "%s:%d", inet_ntop(AF_INET, &in->sin_addr, text, sizeof text), ntohs(in->sin_port));
  } else if (addr.ss_family == AF_INET6) {
    struct sockaddr_in6 *in6 = (void *)&addr;
    sprintf(to, "[%s]:%d", inet_ntop(AF_INET6, &in6->sin6_addr, text, sizeof text), ntohs(in6->sin6_port));
  } else {
    sprintf(to, "family %d", addr.ss_family);
  }
  return to;
}

static int has(const char *options, const char *option) { return strstr(options, option) != NULL; }

static int make(const char *kind, const char *options) {
  int on = 1, pipes[2], fd;
  const char *device = strstr(options, "device=");
  if (has(options, "pipe")) return pipe(pipes) ? -1 : pipes[0];
  if (!strcmp(kind, "unix")) return socket(AF_UNIX, SOCK_STREAM, 0);
  fd = socket(strchr(kind, '6') ? AF_INET6 : AF_INET, kind[0] == 'u' ? SOCK_DGRAM : SOCK_STREAM,
              !strcmp(kind, "mptcp") ? IPPROTO_MPTCP : 0);
  if (has(options, "reuseaddr")) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (has(options, "reuseport")) setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
  if (has(options, "v6only")) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
  if (has(options, "freebind")) setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &on, sizeof on);
  if (device) {
    char interface[IFNAMSIZ] = "";
    sscanf(device, "device=%15[^,]", interface);
    setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, interface, strlen(interface) + 1);
  }
  if (has(options, "closed")) close(fd);
  return fd;
}

static socklen_t fill(void *at, const char *kind, const char *address, int port) {
  if (!strcmp(kind, "unix")) {
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    strncpy(addr.sun_path, address, sizeof addr.sun_path - 1);
    memcpy(at, &addr, sizeof addr);
    return sizeof addr;
  }
  if (strchr(kind, '6')) {
    struct sockaddr_in6 addr = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    inet_pton(AF_INET6, address, &addr.sin6_addr);
    memcpy(at, &addr, sizeof addr);
    return sizeof addr;
  }
  struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons(port)};
  inet_pton(AF_INET, address, &addr.sin_addr);
  memcpy(at, &addr, sizeof addr);
  return sizeof addr;
}

static void bind_it(const char *kind, const char *address, int port, const char *options) {
  long page = sysconf(_SC_PAGESIZE);
  char *before = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char *pages = before + page;
  struct sockaddr_storage addr = {0};
  void *at = &addr;
  int fd = make(kind, options), result, error;
  char text[80], out[200];
  socklen_t len = fill(&addr, kind, address, port), size = len;
  const char *given = strstr(options, "len=");
  munmap(before, page);
  munmap(pages + page, page);
  if (given) len = strtol(given + 4, NULL, 10);
  if (has(options, "edge")) memcpy(at = pages + page - size, &addr, size);
  if (has(options, "early")) at = pages - 4;
  if (has(options, "unmapped")) at = pages + page;
  if (has(options, "null")) at = NULL;
  errno = UNTOUCHED;
  result = bind(fd, at, len);
  error = errno;
  sprintf(out, "bind %d %s", result, error == UNTOUCHED ? "-" : strerror(error));
  if (has(options, "listen")) {
    errno = UNTOUCHED;
    result = listen(fd, 16);
    error = errno;
    sprintf(out + strlen(out), ", listen %d %s", result, error == UNTOUCHED ? "-" : strerror(error));
  }
  if (has(options, "connect=")) {
    struct sockaddr_in to;
    fill(&to, "tcp4", "127.0.0.1", strtol(strstr(options, "connect=") + 8, NULL, 10));
    sprintf(out + strlen(out), ", connect %d", connect(fd, (void *)&to, sizeof to));
  }
  printf("%s, name %s\n", out, name(fd, text));
  fflush(stdout);
  if (has(options, "exec")) {
    if (!fork()) {
      sprintf(text, "%d", fd);
      execl(self, self, "passed", text, NULL);
    }
    wait(NULL);
  }
}

static void *one(void *argument) {
  char kind[8] = "", address[100] = "", options[100] = "";
  int port = 0;
  sscanf(argument, "%7[^,],%99[^,],%d,%99s", kind, address, &port, options);
  if (has(options, "fork")) {
    if (!fork()) {
      bind_it(kind, address, port, options);
      _exit(0);
    }
    wait(NULL);
  } else {
    bind_it(kind, address, port, options);
  }
  return NULL;
}

int main(int argc, char **argv) {
  char text[80];
  self = argv[0];
  if (argc == 3 && !strcmp(argv[1], "passed")) {
    int fd = atoi(argv[2]), result = listen(fd, 16);
    printf("passed: listen %d, name %s\n", result, name(fd, text));
    return 0;
  }
  for (int at = 1; at < argc; at++) {
    pthread_t thread;
    if (!strcmp(argv[at], "hold")) pause();
    if (pthread_create(&thread, NULL, one, argv[at])) return 1;
    pthread_join(thread, NULL);
  }
  return 0;
}
