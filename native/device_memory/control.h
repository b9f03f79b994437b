/* The thread that serves the control socket, and the socket. */
#ifndef REWARM_DEVICE_MEMORY_CONTROL_H
#define REWARM_DEVICE_MEMORY_CONTROL_H

#include <stdbool.h>

/* True if the thread runs; the first call starts it. False for good if it cannot be had, or has ended. */
bool rw_control_start(void);

#endif
