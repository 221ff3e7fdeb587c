/* SPDX-License-Identifier: MIT */
/*
 * brk: 43 pages up (the first makes the heap: 1 new; 42 merge with it: 42 merges, 42 grow), 37 down
 * (1 split, 1 unmap each), then the rest at once (1 unmap of a whole VMA), 7 calls that only ask and
 * 5 refused ones (below the start of the heap), which change nothing.
 */
#include "workload.h"

enum { UP = 43, DOWN = 37, ASK = 7, REFUSED = 5 };

static char *move_break(char *to)
{
	want.brk++;
	return (char *)syscall(SYS_brk, to);
}

int main(int argc, char **argv)
{
	char *base;

	wl_start(argc, argv, "brk_growth");
	base = move_break(NULL);
	for (long i = 1; i < ASK; i++)
		move_break(NULL);
	for (long i = 1; i <= UP; i++) {
		if (move_break(base + i * wl.page) != base + i * wl.page)
			wl_die("brk up");
		if (i == 1) {
			want.fresh++;
		} else {
			want.merge++;
			want.grow++;
		}
		wl_check("up");
	}
	for (long i = 0; i < REFUSED; i++) {
		if (move_break((char *)wl.page) != base + UP * wl.page)
			wl_die("brk below the heap");
		want.failed++;
	}
	for (long i = UP - 1; i >= UP - DOWN; i--) {
		if (move_break(base + i * wl.page) != base + i * wl.page)
			wl_die("brk down");
		want.split++;
		want.unmap++;
		wl_check("down");
	}
	move_break(base);
	want.unmap++;
	wl_finish();
}
