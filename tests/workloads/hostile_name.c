/* SPDX-License-Identifier: MIT */
/*
 * hostile_name [-d DIR]: names that hurt a careless reader. Makes files in DIR (default: the current
 * one) whose names hold a newline, a colour escape, a backslash, a forged maps line, bytes that are no
 * UTF-8 and "(deleted)"; maps each (7 new, 7 private file maps, one removed while mapped) and sets the
 * task's name to an escape sequence. The maps stay until the end, the files are removed.
 */
#include "workload.h"
#include <sys/prctl.h>

static const char *const names[] = {
	"new\nline",
	"red\033[31mred\033[0m",
	"back\\slash\\012",
	"00400000-00401000 r-xp 00000000 00:00 0 \n7f0000000000-7f0000001000 rwxp 00000000 00:00 0",
	"bytes\377\376\200",
	"really (deleted)",
	"gone\ttab",
};

int main(int argc, char **argv)
{
	const long count = sizeof(names) / sizeof(names[0]);
	char path[512];

	wl_start(argc, argv, "hostile_name");
	if (wl.argc == 3 && !strcmp(argv[1], "-d") && chdir(argv[2]))
		wl_die(argv[2]);
	prctl(PR_SET_NAME, "\033[2Jx\n\"\\'");
	for (long i = 0; i < count; i++) {
		int fd;

		snprintf(path, sizeof(path), "%s", names[i]);
		fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
		if (fd < 0 || ftruncate(fd, wl.page))
			wl_die("file");
		wl_mmap(NULL, 1, RO, MAP_PRIVATE, fd, 0);
		want.fresh++;
		close(fd);
		wl_check("map");
		/* All but the last keep their names until the dump is written. */
		if (i == count - 1)
			unlink(path);
	}
	wl_check("end");
	if (wl.expect)
		wl_print();
	if (wl.dump)
		wl_dump(wl.dump);
	for (long i = 0; i < count - 1; i++)
		unlink(names[i]);
	_exit(wl.status);
}
