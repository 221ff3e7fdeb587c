/* SPDX-License-Identifier: MIT */
/*
 * Calls that fail half way and keep what they did. 11 rounds each of:
 * mprotect from inside an area over a gap (ENOMEM): 1 split below, the rest after the gap untouched;
 * mlock over a gap (ENOMEM): 1 split; munmap over gaps (works): 2 cuts at the edges, 2 unmaps;
 * mprotect to writable of [private area, read-only shared file]: EACCES at the second VMA, the first
 * stays changed: 1 split.
 */
#include "workload.h"

enum { ROUNDS = 11 };

static void fails(long result, int due, const char *what)
{
	if (result != -1 || errno != due)
		wl_die(what);
	want.failed++;
	want.split++;
	wl_check(what);
}

/* Two areas of three pages with one free page between them. */
static char *pair(void)
{
	char *at = wl_room(7);

	wl_anon(at, 3, RW);
	wl_anon(at + 4 * wl.page, 3, RW);
	want.fresh += 2;
	return at;
}

int main(int argc, char **argv)
{
	char *at;
	int fd, ro;

	wl_start(argc, argv, "mprotect_gap");
	fd = memfd_create("gap", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, 8 * wl.page))
		wl_die("memfd");
	{
		char link[64];

		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		ro = open(link, O_RDONLY | O_CLOEXEC);
		if (ro < 0)
			wl_die("read-only memfd");
	}
	for (long i = 0; i < ROUNDS; i++) {
		at = pair();
		want.mprotect++;
		fails(mprotect(at + 2 * wl.page, 3 * wl.page, RO), ENOMEM, "mprotect over a gap");
		wl_clear(at, 7, 3);

		at = pair();
		want.mlock++;
		fails(mlock(at + 2 * wl.page, 3 * wl.page), ENOMEM, "mlock over a gap");
		wl_clear(at, 7, 3);

		at = pair();
		wl_munmap(at + 2 * wl.page, 3);
		want.split += 2;
		want.unmap += 2;
		wl_check("munmap over a gap");
		wl_clear(at, 7, 2);

		at = wl_room(6);
		wl_anon(at, 3, RO);
		wl_mmap(at + 3 * wl.page, 3, RO, MAP_SHARED | MAP_FIXED_NOREPLACE, ro, 0);
		want.fresh += 2;
		want.mprotect++;
		fails(mprotect(at + wl.page, 4 * wl.page, RW), EACCES, "mprotect of a read-only file");
		wl_clear(at, 6, 3);
	}
	wl_finish();
}
