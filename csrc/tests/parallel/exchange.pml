/* The meetings of group_exchange.cpp and waiting.h for Spin, a second opinion beside the tables of
   exchange_protocol_test.cpp. Memory is sequentially consistent here; weak memory is the explorer's.
   How to check it: docs/TESTING.md. With -DDEATH the last rank may stop anywhere. With -DONE_SLAB,
   -DNO_LOOK or -DEARLY_ARRIVAL, or with -DDEATH -DNO_RING, Spin must find an error. */
#ifndef N
#define N 2 /* ranks */
#endif
#ifndef MEETINGS
#define MEETINGS 3
#endif
#ifdef ONE_SLAB
#define SLABS 1
#else
#define SLABS 2
#endif
#define SLAB(rank) slabs[(rank) * SLABS + meeting % SLABS]

byte slabs[N * SLABS];
byte arrivals[N];
byte awaits[N]; /* the rank that is waited for, + 1 */
byte rung[N];
bool asleep[N];
bool failed;
bool is_dead; /* the last rank */
byte n_ended;

inline ring(whom) {
  rung[whom]++;
  asleep[whom] = false
}

/* The processes are init (0), the ranks (1 to N) and the watcher. */
#ifdef DEATH
proctype Rank(byte me) provided (!(is_dead && _pid == N)) {
#else
proctype Rank(byte me) {
#endif
  byte meeting, other, seen;
  do
  :: meeting == MEETINGS -> break
  :: else ->
    meeting++;
#ifdef EARLY_ARRIVAL
    arrivals[me] = meeting;
    SLAB(me) = meeting;
#else
    SLAB(me) = meeting;
    arrivals[me] = meeting;
#endif
    for (other : 0 .. N - 1) {
      if
      :: other != me && awaits[other] == me + 1 -> ring(other)
      :: else
      fi
    }
    for (other : 0 .. N - 1) {
      do
      :: other == me || arrivals[other] >= meeting -> break
      :: failed -> goto ended
      :: else ->
        awaits[me] = other + 1;
        seen = rung[me];
#ifndef NO_LOOK
        if
        :: arrivals[other] >= meeting -> awaits[me] = 0; break
        :: else
        fi;
        if
        :: failed -> goto ended
        :: else
        fi;
#endif
        /* The futex: asleep unless the bell has rung. */
        if
        :: atomic { rung[me] == seen -> asleep[me] = true }
        :: atomic { rung[me] != seen -> skip }
        fi;
        !asleep[me];
        awaits[me] = 0
      od
    }
    for (other : 0 .. N - 1) {
      assert(SLAB(other) == meeting) /* neither stale nor overwritten */
    }
  od;
ended:
  n_ended++
}

/* Group::fail, where the last rank stops at any moment. */
proctype Watcher() {
  byte i;
  if
  :: is_dead = true;
    failed = true;
#ifndef NO_RING
    for (i : 0 .. N - 1) { ring(i) }
#endif
  :: true
  fi
}

init {
  byte i;
  atomic {
    for (i : 0 .. N - 1) { run Rank(i) }
#ifdef DEATH
    run Watcher()
#endif
  }
  do
  :: n_ended == N || (is_dead && n_ended >= N - 1) -> break
  :: timeout -> assert(false) /* who lives does not come to an end: nothing can move */
  od
}
