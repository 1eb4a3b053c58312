/*
 * Now, by the clocks of clock.h: what memconsole-resume writes into its record, the control process writes into the
 * manifest.
 */
#include "clock.h"
#include "core.h"

void mc_moment(struct mc_moment *now)
{
	struct moment found = moment_now();

	now->ticks = found.ticks;
	now->boottime_ns = found.boottime_ns;
	now->realtime_ns = found.realtime_ns;
}
