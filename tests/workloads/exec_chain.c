/* SPDX-License-Identifier: MIT */
/*
 * Execs itself 7 times (8 images, one PID); before each exec it cuts 5 head pages off a new area of
 * its own (1 new, 5 splits, all gone with the image), the last image too: 8 new, 40 splits, 7 execs.
 *
 * With --baseline there is one image; so the loader's part comes 8 times as often in the full run.
 */
#include "workload.h"

enum { EXECS = 7, CUTS = 5 };

int main(int argc, char **argv)
{
	char *args[32];
	static char number[32], status[32];
	char *at;
	long left = EXECS;
	int n = 0;

	wl_start(argc, argv, "exec_chain");
	if (wl.argc > 1)
		left = atol(argv[1]);
	at = wl_anon(NULL, CUTS + 1, RW);
	for (long i = 0; i < CUTS; i++)
		wl_mprotect(at + i * wl.page, 1, i % 2 ? NONE : RO);
	if (left > 0) {
		args[n++] = argv[0];
		if (wl.expect)
			args[n++] = "--expect";
		if (wl.dump) {
			args[n++] = "-o";
			args[n++] = (char *)wl.dump;
		}
		snprintf(status, sizeof(status), "%d", wl.status);
		args[n++] = "-x";
		args[n++] = status;
		snprintf(status, sizeof(status), "%d", wl.status);
		args[n++] = "-x";
		args[n++] = status;
		snprintf(number, sizeof(number), "%ld", left - 1);
		args[n++] = number;
		args[n] = NULL;
		execv("/proc/self/exe", args);
		wl_die("execv");
	}
	memset(&want, 0, sizeof(want));
	want.exec = EXECS;
	want.mmap = want.fresh = EXECS + 1;
	want.mprotect = want.split = (EXECS + 1) * CUTS;
	wl.check = 0;
	wl_finish();
}
