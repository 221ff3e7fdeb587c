/* SPDX-License-Identifier: MIT */
/*
 * 17 forks. The parent holds 5 VMAs with DONTFORK (not copied) and 3 with WIPEONFORK (copied, empty);
 * every child cuts 7 pages off (7 splits, 119 in all), joins 3 of them again (3 merges, 51 in all, 1
 * victim each) and exits.
 *
 * copy = 17 * (VMAs of the parent - 5): counted at run time, since the loader's own VMAs are copied too.
 */
#include "workload.h"

enum { FORKS = 17, DONTFORK = 5, WIPE = 3, CUTS = 7, JOINS = 3 };

static void child(char *at)
{
	for (long i = 0; i < CUTS; i++)
		if (mprotect(at + i * wl.page, wl.page, i % 2 ? NONE : RO))
			_exit(1);
	/* Back to RW from the top: each joins the rest of the area above it. */
	for (long i = CUTS - 1; i >= CUTS - JOINS; i--)
		if (mprotect(at + i * wl.page, wl.page, RW))
			_exit(1);
	_exit(0);
}

int main(int argc, char **argv)
{
	char *at;
	int status;

	wl_start(argc, argv, "fork_counts");
	at = wl_room(CUTS + 1 + 2 * (DONTFORK + WIPE) + 1);
	wl_anon(at, CUTS + 1, RW);
	want.fresh++;
	for (long i = 0; i < DONTFORK + WIPE; i++) {
		char *one = at + (CUTS + 2 + 2 * i) * wl.page;

		wl_anon(one, 1, RW);
		want.fresh++;
		wl_madvise(one, 1, i < DONTFORK ? MADV_DONTFORK : MADV_WIPEONFORK);
		*one = 1;
	}
	*at = 1;
	wl_check("set up");
	for (long i = 0; i < FORKS; i++) {
		long vmas = wl_vmas();
		pid_t pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

		if (pid == 0)
			child(at);
		if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
			wl_die("child");
		want.fork++;
		want.copy += vmas - DONTFORK;
		want.forked += vmas - DONTFORK;
	}
	/* The children's part, which is not in this address space. */
	wl_check("forked");
	wl.check = 0;
	want.mprotect += FORKS * (CUTS + JOINS);
	want.split += FORKS * CUTS;
	want.merge += FORKS * JOINS;
	want.victims += FORKS * JOINS;
	wl_finish();
}
