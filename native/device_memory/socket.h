/* The control socket's two ends, which stay open in the process. */
#ifndef REWARM_DEVICE_MEMORY_SOCKET_H
#define REWARM_DEVICE_MEMORY_SOCKET_H

#include "protocol.h"

#include <stdbool.h>

/* The number of the end for rewarm, or -1. */
int rw_socket_open(void);

/* Closes both ends, if they are still what was opened: the program may have closed them, and opened something else. */
void rw_socket_close(void);

/* Waits for the next request, and for its first descriptor or -1; others are closed. False when there will be none. */
bool rw_socket_receive(struct rw_message *request, int *descriptor);

void rw_socket_send(const struct rw_message *answer, int descriptor);

#endif
