/* Answers each connection on the port of its argument, or of PORT, with "static". */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv) {
    const char *port = argc > 1 ? argv[1] : getenv("PORT");
    const char *answer = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nstatic";
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons(port ? atoi(port) : 0)};
    int one = 1, server = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(server, (struct sockaddr *)&addr, sizeof addr) || listen(server, 16))
        return 4;
    for (;;) {
        char head[4096];
        int client = accept(server, NULL, NULL);
        if (client >= 0 && read(client, head, sizeof head) > 0 && write(client, answer, strlen(answer)) < 0)
            return 5;
        close(client);
    }
}
