/* SPDX-License-Identifier: MIT */
/*
 * maxmap [LIMIT]: fills the address space up to vm.max_map_count (or LIMIT, if that is what the sysctl
 * says) by cutting one page after another out of a big area, then shows what each call answers there:
 * mprotect, madvise and a hole by munmap fail, a one-sided munmap works, mmap works until one above.
 *
 * Prints one JSON object: {"limit", "vmas", "errno": {"mprotect", "madvise", "munmap_hole",
 * "munmap_head", "mmap_first", "mmap_second", "mremap_move", "mprotect_merge"}}; errno 0 = it worked.
 */
#include "workload.h"

static long limit_now(void)
{
	char text[32] = "";
	int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, text, sizeof(text) - 1) <= 0)
		wl_die("max_map_count");
	close(fd);
	return atol(text);
}

static int outcome(long result)
{
	return result == -1 ? errno : 0;
}

int main(int argc, char **argv)
{
	static char text[512];
	long limit, pages, i, vmas;
	int e[8], n;
	char *at, *spare;

	wl_start(argc, argv, "maxmap");
	limit = limit_now();
	pages = limit + 64;
	/* A spare of four pages apart, and the area; both without accounting. */
	spare = wl_room(8) + wl.page;
	wl_anon(spare, 4, RW);
	want.fresh++;
	at = wl_room(pages);
	wl_anon(at, pages, RW);
	/* Head after head, each unlike its neighbour: one cut a call, so the count is reached exactly. */
	for (i = 0; i < pages - 8; i++)
		if (mprotect(at + i * wl.page, wl.page, i % 2 ? NONE : RO))
			break;
	e[0] = errno;
	vmas = wl_vmas();
	e[1] = outcome(madvise(at + i * wl.page, wl.page, MADV_DONTDUMP));
	e[2] = outcome(munmap(spare + wl.page, wl.page));
	e[3] = outcome(munmap(spare, wl.page));
	e[4] = outcome((long)mmap(NULL, wl.page, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	e[5] = outcome((long)mmap(NULL, wl.page, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	e[6] = outcome((long)mremap(spare + wl.page, wl.page, wl.page, MREMAP_MAYMOVE | MREMAP_FIXED, spare - wl.page));
	/* Page i - 1 takes the protection of page i - 2 or of the rest: joining is never refused. */
	e[7] = outcome(mprotect(at + (i - 1) * wl.page, wl.page, RW));
	n = snprintf(text, sizeof(text),
		     "{\"limit\": %ld, \"vmas\": %ld, \"cuts\": %ld, \"errno\": {\"mprotect\": %d, "
		     "\"madvise\": %d, \"munmap_hole\": %d, \"munmap_head\": %d, \"mmap_first\": %d, "
		     "\"mmap_second\": %d, \"mremap_move\": %d, \"mprotect_merge\": %d}}\n",
		     limit, vmas, i, e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]);
	if (write(1, text, n) != n)
		return 1;
	wl.expect = wl.check = 0;
	wl_finish();
}
