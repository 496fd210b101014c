/* Handles SIGTERM as its argument says, prints what the handler was before, "ready", and waits.
 *
 * default, own, signal (own, by signal(3)), one-shot (raises it anew), restore (own, then what was before).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int says(const char *text) { return write(1, text, strlen(text)) > 0; }

static void own(int signal) {
  (void)signal;
  says("own\n");
  _exit(7);
}

static void raises(int signal) {
  says("once\n");
  raise(signal);
}

static const char *what(void (*handler)(int)) {
  return handler == SIG_DFL ? "default" : handler == SIG_IGN ? "ignored" : handler == own ? "own"
       : handler == raises ? "raises" : "somebody's";
}

int main(int argc, char **argv) {
  const char *how = argc > 1 ? argv[1] : "default";
  struct sigaction action = {.sa_handler = own}, was, now;
  errno = 4242;
  sigaction(SIGTERM, NULL, &was);
  printf("before %s\n", what(was.sa_handler));
  if (!strcmp(how, "own")) sigaction(SIGTERM, &action, &was);
  if (!strcmp(how, "signal")) was.sa_handler = signal(SIGTERM, own);
  if (!strcmp(how, "one-shot")) {
    action.sa_handler = raises;
    action.sa_flags = SA_RESETHAND;
    sigaction(SIGTERM, &action, &was);
  }
  if (!strcmp(how, "restore")) {
    sigaction(SIGTERM, &action, &was);
    signal(SIGTERM, was.sa_handler);
  }
  sigaction(SIGTERM, NULL, &now);
  printf("after %s, one-shot %d, errno %d\n", what(now.sa_handler), (now.sa_flags & SA_RESETHAND) != 0, errno);
  /* Others are libc's business. */
  signal(SIGUSR1, own);
  sigaction(SIGUSR1, NULL, &now);
  printf("other %s %s %d\n", what(now.sa_handler), what(signal(SIGUSR1, SIG_DFL)), signal(9999, own) == SIG_ERR);
  puts("ready");
  fflush(stdout);
  for (;;) pause();
}
