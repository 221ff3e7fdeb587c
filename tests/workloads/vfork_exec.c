/* SPDX-License-Identifier: MIT */
/*
 * 13 times vfork and exec of itself; each child makes one RW map of 8 pages, cuts 3 head pages off by
 * mprotect (3 splits) and exits with its number. The parent's address space is lent, not copied: no
 * copy at all. In all 13 execs, 13 new, 39 splits besides what the loader does in each child.
 */
#include "workload.h"

enum { CHILDREN = 13, CUTS = 3 };

static int child(const char *number)
{
	char *at = mmap(NULL, 8 * wl.page, RW, ANON, -1, 0);

	if (at == MAP_FAILED)
		return 99;
	for (long i = 0; i < CUTS; i++)
		if (mprotect(at + i * wl.page, wl.page, i % 2 ? NONE : RO))
			return 99;
	return atoi(number);
}

int main(int argc, char **argv)
{
	int status;

	if (argc == 3 && !strcmp(argv[1], "child")) {
		wl.page = sysconf(_SC_PAGESIZE);
		_exit(child(argv[2]));
	}
	wl_start(argc, argv, "vfork_exec");
	for (long i = 1; i <= CHILDREN; i++) {
		static char number[32];
		char *args[] = { argv[0], "child", number, NULL };
		pid_t pid;

		snprintf(number, sizeof(number), "%ld", i);
		pid = vfork();
		if (pid == 0) {
			execv("/proc/self/exe", args);
			_exit(98);
		}
		if (pid < 0 || waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != i)
			wl_die("child");
		want.fork++;
		want.exec++;
	}
	wl_check("children");
	wl.check = 0;
	want.mmap += CHILDREN;
	want.fresh += CHILDREN;
	want.mprotect += CHILDREN * CUTS;
	want.split += CHILDREN * CUTS;
	wl_finish();
}
