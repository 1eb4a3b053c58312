/* Small files of /proc, which are read in one go. */
#ifndef MEMCONSOLE_PROCTEXT_H
#define MEMCONSOLE_PROCTEXT_H

#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

/* Read up to size - 1 bytes of a file into `text`, and end them with a 0. Returns false where it cannot be opened. */
static inline bool proc_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0)
		return false;
	got = read(fd, text, size - 1);
	close(fd);
	text[got > 0 ? got : 0] = 0;
	return true;
}

#endif
