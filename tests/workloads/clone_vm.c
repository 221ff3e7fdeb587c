/* SPDX-License-Identifier: MIT */
/*
 * 5 children made by clone(CLONE_VM) without CLONE_THREAD: processes of their own in the parent's
 * address space, one after the other. Each cuts the middle page out 53 times (2 splits) and gives it
 * back (1 merge, 2 victims): 530 splits, 265 merges, no copy; all in one address space.
 */
#include "workload.h"
#include <sched.h>

enum { CHILDREN = 5, ROUNDS = 53, STACK = 1 << 16 };

static char stack[STACK] __attribute__((aligned(4096)));

static int child(void *argument)
{
	char *at = argument;

	for (long i = 0; i < ROUNDS; i++)
		if (mprotect(at + wl.page, wl.page, RO) || mprotect(at + wl.page, wl.page, RW))
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	char *at;
	int status;

	wl_start(argc, argv, "clone_vm");
	at = wl_room(3);
	wl_anon(at, 3, RW);
	want.fresh++;
	for (long i = 0; i < CHILDREN; i++) {
		pid_t pid = clone(child, stack + STACK, CLONE_VM | SIGCHLD, at);

		if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
			wl_die("child");
		want.fork++;
		want.mprotect += 2 * ROUNDS;
		want.split += 2 * ROUNDS;
		want.merge += ROUNDS;
		want.victims += 2 * ROUNDS;
		wl_check("child");
	}
	wl_clear(at, 3, 1);
	wl_finish();
}
