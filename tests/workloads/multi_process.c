/* SPDX-License-Identifier: MIT */
/*
 * multi_process [-d DIR]: 5 processes at the same time, each in its own address space, each with its own
 * prime count of cuts: 11, 13, 17, 19, 23 (83 splits in all, each given back: 83 merges, 83 victims).
 * Each child writes its final maps to DIR/maps.PID and prints nothing. Copies: 5 * the parent's VMAs.
 */
#include "workload.h"

static const long cuts[] = { 11, 13, 17, 19, 23 };

static void child(char *at, long n, const char *directory)
{
	char path[4096];

	for (long i = 0; i < n; i++) {
		if (mprotect(at + i * wl.page, wl.page, i % 2 ? NONE : RO))
			_exit(1);
		if (i % 4 == 0)
			usleep(1000);
	}
	for (long i = n - 1; i >= 0; i--)
		if (mprotect(at + i * wl.page, wl.page, RW))
			_exit(1);
	if (directory) {
		snprintf(path, sizeof(path), "%s/maps.%d", directory, (int)getpid());
		wl_dump(path);
	}
	_exit(0);
}

int main(int argc, char **argv)
{
	const long children = sizeof(cuts) / sizeof(cuts[0]);
	const char *directory = NULL;
	int status;
	char *at;

	wl_start(argc, argv, "multi_process");
	if (wl.argc == 3 && !strcmp(argv[1], "-d"))
		directory = argv[2];
	at = wl_room(32);
	wl_anon(at, 32, RW);
	want.fresh++;
	for (long i = 0; i < children; i++) {
		long vmas = wl_vmas();
		pid_t pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

		if (pid == 0)
			child(at, cuts[i], directory);
		if (pid < 0)
			wl_die("clone");
		want.fork++;
		want.copy += vmas;
		want.forked += vmas;
	}
	for (long i = 0; i < children; i++)
		if (wait(&status) < 0 || status)
			wl_die("child");
	wl_check("children");
	wl.check = 0;
	for (long i = 0; i < children; i++) {
		want.mprotect += 2 * cuts[i];
		want.split += cuts[i];
		want.merge += cuts[i];
		want.victims += cuts[i];
	}
	wl_finish();
}
