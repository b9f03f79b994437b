/* All processes below this one: to be killed together, however they forked and in whatever session or namespace
 * they are. */
#ifndef REWARM_DESCENDANTS_H
#define REWARM_DESCENDANTS_H

/* Whether this kernel lists children in /proc (CONFIG_PROC_CHILDREN). Returns 0 or -errno. */
int descendants_check(void);

/* Kills and reaps until there is none. The caller has to be a child subreaper: then whoever loses its parent comes
 * to it (or to a subreaper below it), and "no children" means "no descendants". Does not return while one of them
 * cannot die (stuck in the kernel), since it must not be called gone. */
void descendants_destroy(void);

#endif
