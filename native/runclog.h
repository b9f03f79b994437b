/* Lines in runc's log, as runc (logrus) writes them: containerd's shim shows the last one of level "error" to
 * users. */
#ifndef REWARM_RUNCLOG_H
#define REWARM_RUNCLOG_H

#include "argv.h"

/* To --log, or to stderr without one. */
__attribute__((format(printf, 2, 3))) void log_warning(const struct call *call, const char *format, ...);

/* To --log and, in plain words, to stderr: runc's own errors go both ways. */
__attribute__((format(printf, 2, 3))) void log_error(const struct call *call, const char *format, ...);

#endif
