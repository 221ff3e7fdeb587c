/* SPDX-License-Identifier: MIT */
/*
 * The benchmark's workload: one call again and again, timed with CLOCK_MONOTONIC.
 *
 *   storm mprotect N    N mprotects: the first page of two read-only (1 split), then back (1 merge)
 *   storm middle N      N mprotects: the middle page of three read-only (2 splits), then back (1 merge)
 *   storm flip N        N mprotects of a whole map: flags change, nothing is cut or joined
 *   storm pair N        N times mmap of one page and munmap of it (an "operation" is the pair)
 *   storm getppid N     N getppid(): a call that shapes nothing (what bystanders pay)
 *   storm mix SECONDS   mprotect and pair in turn, for that time; counts them
 *
 *   --rounds R          R rounds of N (default 1); the least time a round took is reported too
 *   --wait-for-go       say "ready" on stdout and wait for a byte on stdin before each round
 *
 * Prints one JSON object a round: {"what", "ops", "ns", "ns_per_op", "mprotect", "pair"}, the last two
 * being the calls made so far (a pair is two calls).
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static size_t page;
static char *area;
static unsigned long mprotects, pairs;

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void do_mprotect(long n, char *at, size_t size)
{
	for (long i = 0; i < n; i++)
		if (mprotect(at, size, i % 2 ? PROT_READ | PROT_WRITE : PROT_READ))
			die("mprotect");
	mprotects += n;
}

static void do_pair(long n)
{
	for (long i = 0; i < n; i++) {
		char *at = mmap(NULL, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (at == MAP_FAILED || munmap(at, page))
			die("pair");
	}
	pairs += n;
}

static void do_getppid(long n)
{
	for (long i = 0; i < n; i++)
		syscall(SYS_getppid);
}

static long do_mix(long seconds)
{
	uint64_t end = now() + seconds * 1000000000ull;
	long n = 0;

	while (now() < end) {
		do_mprotect(1000, area, page);
		do_pair(500);
		n += 1500;
	}
	return n;
}

static void report(const char *what, long ops, uint64_t ns)
{
	char text[256];
	int n = snprintf(text, sizeof(text),
			 "{\"what\": \"%s\", \"ops\": %ld, \"ns\": %llu, \"ns_per_op\": %.1f, "
			 "\"mprotect\": %lu, \"pair\": %lu}\n",
			 what, ops, (unsigned long long)ns, ops ? (double)ns / ops : 0.0, mprotects, pairs);

	if (write(1, text, n) != n)
		exit(1);
}

static void wait_for_go(void)
{
	char byte;

	if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
		exit(1);
}

int main(int argc, char **argv)
{
	long n, rounds = 1, ops;
	int waiting = 0;
	uint64_t before;

	if (argc < 3) {
		fprintf(stderr, "usage: storm mprotect|middle|flip|pair|getppid|mix N [--rounds R] [--wait-for-go]\n");
		return 2;
	}
	n = atol(argv[2]);
	for (int i = 3; i < argc; i++) {
		if (!strcmp(argv[i], "--wait-for-go"))
			waiting = 1;
		else if (!strcmp(argv[i], "--rounds") && i + 1 < argc)
			rounds = atol(argv[++i]);
	}
	page = sysconf(_SC_PAGESIZE);
	area = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("mmap");
	for (long i = 0; i < rounds; i++) {
		if (waiting)
			wait_for_go();
		ops = n;
		before = now();
		if (!strcmp(argv[1], "mprotect"))
			do_mprotect(n, area, page);
		else if (!strcmp(argv[1], "middle"))
			do_mprotect(n, area + page, page);
		else if (!strcmp(argv[1], "flip"))
			do_mprotect(n, area, 3 * page);
		else if (!strcmp(argv[1], "pair"))
			do_pair(n);
		else if (!strcmp(argv[1], "getppid"))
			do_getppid(n);
		else if (!strcmp(argv[1], "mix"))
			ops = do_mix(n);
		else
			return 2;
		report(argv[1], ops, now() - before);
	}
	return 0;
}
