/* SPDX-License-Identifier: MIT */
/*
 * signal_death SIGNAL: cuts 11 head pages off an area (1 new, 11 splits), writes its dump (-o), then
 * dies by SIGNAL: SEGV by a write to a read-only page, any other number (9, 15, 6...) by kill().
 */
#include "workload.h"

enum { CUTS = 11 };

int main(int argc, char **argv)
{
	char *at;
	int number;

	wl_start(argc, argv, "signal_death");
	number = wl.argc > 1 ? atoi(argv[1]) : SIGSEGV;
	at = wl_room(CUTS + 1);
	wl_anon(at, CUTS + 1, RW);
	want.fresh++;
	for (long i = 0; i < CUTS; i++) {
		wl_mprotect(at + i * wl.page, 1, i % 2 ? NONE : RO);
		want.split++;
		wl_check("mprotect");
	}
	if (wl.expect)
		wl_print();
	if (wl.dump)
		wl_dump(wl.dump);
	if (number == SIGSEGV)
		*(volatile char *)at = 1;
	kill(getpid(), number);
	pause();
	return 97;
}
