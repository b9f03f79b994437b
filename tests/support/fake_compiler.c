/* Stands for the driver's compiler, of which only is asked whether it is there. What it would do is in
 * fake_cuda_digests.c. */
#include "fake_node.h"

EXPORT int fake_compiler;
