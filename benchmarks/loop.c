/* The yardstick: the least that a server can do. One thread accepts, reads the request, sends the
   head; for each event it calls send() once for each client. No log, no resume, no heartbeat, no
   check of anything.

   Prints its port. Then each line `COUNT MICROSECONDS` on standard input publishes COUNT events
   with that pause between two of them, and is answered by a line. The end of standard input ends
   it. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static const char HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    "Access-Control-Allow-Origin: *\r\nCache-Control: no-cache, no-transform\r\n"
    "X-Accel-Buffering: no\r\n\r\n";
static int clients[65536], count;
static long sequence;

static void accept_all(int listener)
{
    char request[4096];
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0) {
        if (count == 65536 || recv(fd, request, sizeof request, 0) <= 0
            || send(fd, HEAD, sizeof HEAD - 1, MSG_NOSIGNAL) < 0) {
            close(fd);
            continue;
        }
        clients[count++] = fd;
    }
}

static void publish(long events, long pause)
{
    struct timespec now, next;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (long i = 0; i < events; i++) {
        char payload[200], frame[256];
        clock_gettime(CLOCK_MONOTONIC, &now);
        int size = sprintf(payload, "id: 1764000000000-%ld\ndata: %019lld %09ld ", i % 10,
                           (long long)now.tv_sec * 1000000000 + now.tv_nsec, sequence++);
        memset(payload + size, 'x', 98 - 4 - size);
        strcpy(payload + 94, "\r\n\r\n");
        size = sprintf(frame, "%08x\r\n%s\r\n", 98, payload);
        for (int c = 0; c < count; c++)
            send(clients[c], frame, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        next.tv_nsec += pause * 1000;
        next.tv_sec += next.tv_nsec / 1000000000;
        next.tv_nsec %= 1000000000;
        if (pause)
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}

int main(void)
{
    int one = 1, buffer = 64 << 10;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1024)
        || getsockname(listener, (struct sockaddr *)&address, &length))
        return 1;
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct pollfd ready[2] = {{listener, POLLIN, 0}, {0, POLLIN, 0}};
    char line[100];
    while (poll(ready, 2, -1) > 0) {
        if (ready[0].revents)
            accept_all(listener);
        if (ready[1].revents) {
            ssize_t size = read(0, line, sizeof line - 1);
            long events, pause;
            if (size <= 0)
                return 0;
            line[size] = 0;
            if (sscanf(line, "%ld %ld", &events, &pause) == 2)
                publish(events, pause);
            printf("done\n");
            fflush(stdout);
        }
    }
    return 1;
}
