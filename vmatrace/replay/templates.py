"""The fixed parts of a reproducer: C text that maps, reads /proc/self/smaps and compares."""

from __future__ import annotations

from typing import Final

TOP: Final = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif
#ifndef SYS_set_mempolicy_home_node
#define SYS_set_mempolicy_home_node 450
#endif

/* One VMA: offsets from the start of the area, rights, and the flags that smaps shows besides. */
struct area { unsigned long start, end; char rights[8], flags[64]; };
enum { MEMORY, DISK, ZERO, SECRET, MOST = 512 };

static char *area;

static void die(const char *what)
{
	perror(what);
	exit(3);
}

static inline void check(int failed, const char *what)
{
	if (failed)
		fprintf(stderr, "warning: %s: %s\n", what, strerror(errno));
}

/* The file that stands in for number n of the trace: the same one each time. */
static inline int file(int n, int kind)
{
	static int known[64];
	char name[] = "/tmp/vmatrace.XXXXXX";

	if (n >= 64)
		die("files");
	if (known[n])
		return known[n];
	known[n] = kind == MEMORY ? (int)syscall(SYS_memfd_create, "vmatrace", 0) :
			kind == SECRET ? (int)syscall(SYS_memfd_secret, 0) :
			kind == DISK ? mkstemp(name) : open("/dev/zero", O_RDWR);
	if (known[n] < 0)
		die("file");
	if (kind == DISK)
		unlink(name);
	if (kind != ZERO && ftruncate(known[n], 1l << 30))
		die("ftruncate");
	return known[n];
}

static inline void map(unsigned long start, unsigned long length, int prot, int flags, int fd, long offset)
{
	if (mmap(area + start, length, prot, flags | MAP_FIXED, fd, offset) == MAP_FAILED)
		die("mmap");
}

/* Maps where the page offset wanted is the natural one, faults there, and moves it into place. */
static inline void map_moved(unsigned long start, unsigned long length, int flags, long distance)
{
	char *away = area + start + distance;

	if (mmap(away, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED_NOREPLACE, -1, 0) != away)
		die("mmap elsewhere");
	*(volatile char *)away = 1;
	if (mremap(away, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, area + start) == MAP_FAILED)
		die("mremap");
}

static inline void touch(unsigned long at)
{
	*(volatile char *)(area + at) = 1;
}

/* A write fault by the kernel: where it may not be nothing happens. */
static inline void poke(char *at)
{
	static int zero;

	if (!zero)
		zero = open("/dev/zero", O_RDONLY);
	if (read(zero, at, 1) < 0)
		return;
}

static inline unsigned long *nodes(unsigned long mask)
{
	static unsigned long given;

	given = mask;
	return &given;
}

static inline struct rlimit *limit(unsigned long soft, unsigned long hard)
{
	static struct rlimit given;

	given.rlim_cur = soft;
	given.rlim_max = hard;
	return &given;
}

/* Goes on in a child, whose copies of what was faulted are forked ones. */
static inline void go_on_in_a_child(void)
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (!pid)
		return;
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	exit(WIFEXITED(status) ? WEXITSTATUS(status) : 3);
}
"""

STAGE: Final = r"""
int main(void)
{
	const unsigned long length = @LENGTH@, huge = 2ul << 20;

	area = mmap(NULL, length + huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("no room");
	munmap(area, length + huge);
	area += -(unsigned long)area % huge;
	printf("%lx\n", (unsigned long)area);
	fflush(stdout);
	for (int i = 0; candidates[i]; i++) {
		pid_t pid = fork();

		if (!pid) {
			for (const int *step = candidates[i]; *step >= 0; step++)
				steps[*step]();
			_exit(0);
		}
		if (pid < 0 || waitpid(pid, NULL, 0) != pid)
			die("fork");
	}
	return 0;
}
"""

MAIN: Final = r"""
enum { EXPECTED_ERRNO = @EXPECTED@, OBSERVED_ERRNO = @OBSERVED@ };
static const unsigned long length = @LENGTH@;

/* The flags of which the program takes notice, in the order in which it names them. */
static void pick_flags(const char *line, char *flags)
{
	static const char *const codes[] = { "gd", "lo", "sr", "rr", "dc", "de", "ac", "nr", "wf",
						"dd", "hg", "nh", "mg", "sl", "um", "uw" };

	*flags = 0;
	for (unsigned i = 0; i < sizeof(codes) / sizeof(codes[0]); i++) {
		char word[5] = { ' ', codes[i][0], codes[i][1], ' ', 0 };

		if (strstr(line, word))
			strcat(strcat(flags, *flags ? " " : ""), codes[i]);
	}
}

static void look(struct area *found)
{
	static char line[4096];
	FILE *in = fopen("/proc/self/smaps", "r");
	unsigned long start, end, low = (unsigned long)area;
	int n = 0, inside = 0;

	if (!in)
		die("smaps");
	while (fgets(line, sizeof(line), in)) {
		struct area *now = &found[n];

		if (sscanf(line, "%lx-%lx %7s", &start, &end, now->rights) == 3) {
			inside = start >= low && end <= low + length && n < MOST - 1;
			now->start = start - low;
			now->end = end - low;
		} else if (inside && !strncmp(line, "VmFlags:", 8)) {
			pick_flags(line, now->flags);
			n++;
			inside = 0;
		}
	}
	fclose(in);
	memset(&found[n], 0, sizeof(found[n]));
}

static void show(const char *label, const struct area *a)
{
	printf("%s\n", label);
	for (; a->end; a++)
		printf("  %8lx-%-8lx %s %s\n", a->start, a->end, a->rights, a->flags);
}

static int same(const struct area *a, const struct area *b)
{
	for (; a->end || b->end; a++, b++)
		if (a->start != b->start || a->end != b->end || strcmp(a->rights, b->rights) ||
			strcmp(a->flags, b->flags))
			return 0;
	return 1;
}

int main(void)
{
	static struct area now[MOST];
	const unsigned long margin = 1ul << 21;
	int rebuilt, as_expected, as_observed, error;

	area = mmap(NULL, length + 2 * margin, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("no room");
	munmap(area, length + 2 * margin);
	area += margin;
	rebuild();
	look(now);
	rebuilt = same(now, before);
	show("before", now);
	if (!rebuilt)
		show("before, in the trace", before);
	errno = 0;
	error = operation() == -1 ? errno : 0;
	look(now);
	printf("result: %s\n", error ? strerror(error) : "success");
	show("after", now);
	show("expected by the rules", expected);
	show("observed in the trace", observed);
	puts(@REASON@);
	as_expected = same(now, expected) && error == EXPECTED_ERRNO;
	as_observed = same(now, observed) && error == OBSERVED_ERRNO;
	if (as_expected && as_observed)
		puts("both look like this from outside: what differs is not in /proc");
	else
		puts(as_expected ? "as the rules expect" : as_observed ? "as the trace shows" : "neither");
	if (!as_expected && !as_observed && !rebuilt)
		return 3;
	return as_observed ? 1 : as_expected ? 0 : 2;
}
"""
