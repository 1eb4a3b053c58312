/*
 * Reads superblocks with native/arena_label.h. stdin: 1024 bytes, again and again; stdout for each a line: "-", or its
 * name, whether its journal is replayed (0, 1), and why it may not be mounted.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../../memconsole/native/arena_label.h"

int main(void)
{
	uint8_t *super = malloc(1024);	/* its own size, so that a byte too far is found */
	char *name = malloc(ARENA_NAME_MAX + 1);

	if (!super || !name)
		return 1;
	while (fread(super, 1, 1024, stdin) == 1024) {
		const char *why = NULL;
		bool replays = false;

		if (arena_label(super, name, &why, &replays))
			printf("%s %d %s\n", name, replays, why ? why : "");
		else
			puts("-");
	}
	free(super);
	free(name);
	return 0;
}
