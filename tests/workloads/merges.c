/* SPDX-License-Identifier: MIT */
/*
 * Merges with the left neighbour 31, with the right one 37, with both 41 - once as new maps by mmap
 * and once as protections given back by mprotect: 2 * (31 + 37 + 41) = 218 merges.
 *
 * Objects that go in a merge (victims): mmap both 41; mprotect both 2 * 41 (the middle and the right
 * one), left 1 and right 1 (the last page is a whole VMA).
 */
#include "workload.h"

enum { LEFT = 31, RIGHT = 37, BOTH = 41 };

static void map_left(void)
{
	char *at = wl_room(LEFT + 1);

	wl_anon(at, 1, RW);
	want.fresh++;
	for (long i = 1; i <= LEFT; i++) {
		wl_anon(at + i * wl.page, 1, RW);
		want.merge++;
		wl_check("mmap left");
	}
	wl_clear(at, LEFT + 1, 1);
}

static void map_right(void)
{
	char *at = wl_room(RIGHT + 1);

	wl_anon(at + RIGHT * wl.page, 1, RW);
	want.fresh++;
	for (long i = RIGHT - 1; i >= 0; i--) {
		wl_anon(at + i * wl.page, 1, RW);
		want.merge++;
		wl_check("mmap right");
	}
	wl_clear(at, RIGHT + 1, 1);
}

static void map_both(void)
{
	long pages = 2 * BOTH + 1;
	char *at = wl_room(pages);

	for (long i = 0; i <= BOTH; i++) {
		wl_anon(at + 2 * i * wl.page, 1, RW);
		want.fresh++;
	}
	wl_check("islands");
	for (long i = 0; i < BOTH; i++) {
		wl_anon(at + (2 * i + 1) * wl.page, 1, RW);
		want.merge++;
		want.victims++;
		wl_check("mmap both");
	}
	wl_clear(at, pages, 1);
}

static void protect_left(void)
{
	char *at = wl_room(LEFT + 1);

	wl_anon(at, LEFT + 1, RW);
	want.fresh++;
	wl_mprotect(at + wl.page, LEFT, RO);
	want.split++;
	for (long i = 1; i <= LEFT; i++) {
		wl_mprotect(at + i * wl.page, 1, RW);
		want.merge++;
		want.victims += i == LEFT;
		wl_check("mprotect left");
	}
	wl_clear(at, LEFT + 1, 1);
}

static void protect_right(void)
{
	char *at = wl_room(RIGHT + 1);

	wl_anon(at, RIGHT + 1, RW);
	want.fresh++;
	wl_mprotect(at, RIGHT, RO);
	want.split++;
	for (long i = RIGHT - 1; i >= 0; i--) {
		wl_mprotect(at + i * wl.page, 1, RW);
		want.merge++;
		want.victims += i == 0;
		wl_check("mprotect right");
	}
	wl_clear(at, RIGHT + 1, 1);
}

static void protect_both(void)
{
	long pages = 2 * BOTH + 1;
	char *at = wl_room(pages);

	wl_anon(at, pages, RW);
	want.fresh++;
	for (long i = 0; i < BOTH; i++) {
		wl_mprotect(at + (2 * i + 1) * wl.page, 1, RO);
		want.split += 2;
		wl_check("stripes");
	}
	for (long i = 0; i < BOTH; i++) {
		wl_mprotect(at + (2 * i + 1) * wl.page, 1, RW);
		want.merge++;
		want.victims += 2;
		wl_check("mprotect both");
	}
	wl_clear(at, pages, 1);
}

int main(int argc, char **argv)
{
	wl_start(argc, argv, "merges");
	map_left();
	map_right();
	map_both();
	protect_left();
	protect_right();
	protect_both();
	wl_finish();
}
