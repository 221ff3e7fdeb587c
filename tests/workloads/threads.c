/* SPDX-License-Identifier: MIT */
/*
 * 7 threads in one address space, each on an area of its own: 101 times cut the middle page out by
 * mprotect (2 splits) and give it back (1 merge, 2 victims). 1,414 splits, 707 merges.
 *
 * The threads' stacks are static arrays, so that the C library maps nothing for them, and their
 * bookkeeping fits the heap, which --baseline has too.
 */
#include "workload.h"
#include <pthread.h>

enum { THREADS = 7, ROUNDS = 101, STACK = 1 << 16 };

static char stacks[THREADS][STACK] __attribute__((aligned(4096)));
static char *areas[THREADS];
static pthread_barrier_t start;

static void *storm(void *argument)
{
	char *at;

	/* Twice: all threads exist, then the areas do. */
	pthread_barrier_wait(&start);
	pthread_barrier_wait(&start);
	at = *(char **)argument;
	for (long i = 0; i < ROUNDS; i++)
		if (mprotect(at + wl.page, wl.page, RO) || mprotect(at + wl.page, wl.page, RW))
			wl_die("mprotect in a thread");
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];
	pthread_attr_t attributes;

	/* The heap is there from the start, --baseline included. */
	void *volatile heap = malloc(64);

	free(heap);
	wl_start(argc, argv, "threads");
	pthread_barrier_init(&start, NULL, THREADS + 1);
	for (long i = 0; i < THREADS; i++) {
		pthread_attr_init(&attributes);
		pthread_attr_setstack(&attributes, stacks[i], STACK);
		errno = pthread_create(&threads[i], &attributes, storm, &areas[i]);
		if (errno)
			wl_die("pthread_create");
	}
	pthread_barrier_wait(&start);
	wl.vmas = wl_vmas();
	for (long i = 0; i < THREADS; i++) {
		areas[i] = wl_room(3);
		wl_anon(areas[i], 3, RW);
		want.fresh++;
	}
	pthread_barrier_wait(&start);
	for (long i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	want.mprotect += 2 * THREADS * ROUNDS;
	want.split += 2 * THREADS * ROUNDS;
	want.merge += THREADS * ROUNDS;
	want.victims += 2 * THREADS * ROUNDS;
	for (long i = 0; i < THREADS; i++)
		wl_clear(areas[i], 3, 1);
	wl_finish();
}
