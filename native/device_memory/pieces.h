/* What the control thread does to a piece that is held. A CUresult or -errno. */
#ifndef REWARM_DEVICE_MEMORY_PIECES_H
#define REWARM_DEVICE_MEMORY_PIECES_H

#include "table.h"

int rw_own(const struct rw_piece *piece);
int rw_export(const struct rw_piece *piece, int *descriptor);
int rw_unmap(const struct rw_piece *piece);
int rw_map(const struct rw_piece *piece, int descriptor);

#endif
