/* SPDX-License-Identifier: MIT */
/*
 * setuid_exec PROGRAM [ARGS]: execs PROGRAM, which may be set-uid; setuid_exec alone: cuts 3 pages off
 * an area (1 new, 3 splits) and prints "UID EUID". To see a traced program gain privileges: copy this
 * program, make the copy root-owned with mode 4755, and run, as another user, `setuid_exec COPY`.
 */
#include "workload.h"

int main(int argc, char **argv)
{
	char text[64];
	char *at;
	int n;

	wl.name = "setuid_exec";
	wl.page = sysconf(_SC_PAGESIZE);
	if (argc > 1) {
		execv(argv[1], argv + 1);
		wl_die(argv[1]);
	}
	at = wl_anon(NULL, 4, RW);
	for (long i = 0; i < 3; i++)
		wl_mprotect(at + i * wl.page, 1, i % 2 ? NONE : RO);
	n = snprintf(text, sizeof(text), "%d %d\n", (int)getuid(), (int)geteuid());
	return write(1, text, n) != n;
}
