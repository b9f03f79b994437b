/* `start` of a restored container, by what its `create` has written down (shim/rewarm/resume.py). */
#ifndef REWARM_START_H
#define REWARM_START_H

#include "argv.h"

/* Lets the stopped tree go on and tidies up. `directory` is the container directory, `container` what runc keeps
 * about it. False when nothing is written down, when it is not true any more, or when something failed on the way:
 * then the call is Python's, which may do all of it again, and has the words for what stands against it. */
bool start_restored(const struct call *call, const char *directory, const char *container);

#endif
