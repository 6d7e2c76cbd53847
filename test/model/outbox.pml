/*
 * The protocol of the outbox platform: prepare, resolve, relay. Two transactions of one aggregate, one event each.
 * README.md says what is modelled and what is not; run.sh says which variants there are and what each must show.
 *
 * What may happen is chosen by macros, so that each question is asked of a small world:
 *   PROMPT (Commit always comes, nobody asks), ROLLBACK, DBCRASH, SPILL, RELAYCRASH, ZOMBIE, REFUSE, REUSE, WRONGVIEW, FAILOVER, CLEAN, PURGE, SKEW
 * A rule is taken away by NO_1 … NO_9, or one of NAIVE_XID, TIMEOUT, NO_CAS, NO_FENCE.
 */

#define N 2
#define LOG 8
#define XIDS 5

/* States of a local transaction, of an xid, and of a transaction in the store. */
#define NONE 0
#define RUNNING 1
#define COMMITTED 2
#define ABORTED 3
#define PREPARED 1

/* Kinds of log records. */
#define EVENT 0
#define COMMIT 1
#define ABORT 2

#define bit(t) (1 << (t))
#define in(set, t) (((set) & bit(t)) != 0)
#define add(set, t) set = (set) | bit(t)
#define del(set, t) set = (set) & (3 - bit(t))

/* ---- the source's database ---- */
byte txn[N];            /* truth: the local transaction */
byte xid[N];
byte rank[N] = 9;       /* in which order they held the aggregate's row lock */
byte ranks;
byte lock;              /* 1 + its holder; 0: free */
byte nextXID = 1;
byte flushed;           /* the highest xid that survives a crash */
byte status[XIDS];      /* pg_xact_status */
byte marker;            /* set of visible markers */
byte spilled;           /* set of visible spilled requests; drained in the order of rank */
byte over;              /* set of services that have ended */
bool wrongView;         /* whoever asks sees another table, or not all of it */

/* ---- the store ---- */
byte state[N];          /* of tx; NONE: there is no row */
byte content[N];        /* what was prepared: 1, or 2 by a second call with the same id */
byte truth[N] = 1;      /* what the service believes that it prepared */
byte byResolver;        /* set: decided by anybody but the client's own Commit */
byte stored[N];         /* how often the events of a transaction entered the log */
byte acked;             /* set: Commit was acknowledged to the client */
byte old;               /* set: acknowledged longer ago than marker_retention */
byte asked;             /* set: a resolver is at it, which takes far less than that */
bool failedOver;
byte logT[LOG];
byte logK[LOG];
byte logged;

/* ---- a shard, and its holder ---- */
byte epoch;
bool leased;
byte cpCursor;
byte cpPend;            /* set: read, neither done nor a row */
byte parked;            /* set: rows of parked */
byte dead;              /* set: dead letters */
bool redrive;           /* an operator's request */
byte refuses;           /* set: Kafka refuses the record */

/* ---- Kafka ---- */
byte out;               /* set: written at least once */
byte net[2];            /* per relay: handed over and not yet written; a process that ends leaves them behind */
byte reported[2];       /* per relay: written, and the holder will be told */
byte refused[2];        /* per relay: refused for good, and the holder will be told */

byte ids[N];            /* the time in the transaction's id, by its service's clock */
bool crashed;           /* a relay has crashed, once */

inline append(k, t) {
	assert(logged < LOG);
	logK[logged] = k; logT[logged] = t; logged++
}

/* ---- decisions ---- */

/* Whoever decides, decides once, and what the source's database says. */
inline decide(t, s, resolver) {
	if
#ifdef NO_CAS
	:: state[t] != NONE && state[t] != s ->
#else
	:: state[t] == PREPARED ->
#endif
		assert(state[t] == PREPARED);                    /* write-once */
		assert(!(s == COMMITTED) || txn[t] == COMMITTED); /* no phantom */
		assert(!(s == ABORTED) || txn[t] == ABORTED);     /* no decision by timeout, no loss */
		state[t] = s;
		if :: resolver -> add(byResolver, t) :: else fi;
		if :: s == COMMITTED -> append(COMMIT, t) :: else -> append(ABORT, t) fi
	:: else
	fi
}

/* Publish of a drained request: stores it, or commits its twin. */
inline publish(t) {
	if
	:: state[t] == NONE ->
		state[t] = COMMITTED; content[t] = 1; stored[t]++;
		assert(stored[t] == 1);                          /* the twin of a spilled request is found */
		append(EVENT, t); append(COMMIT, t)
	:: state[t] == PREPARED -> decide(t, COMMITTED, false)
	:: else -> assert(state[t] == COMMITTED)
	fi
}

/* ---- the service ---- */

proctype Service(byte t) {
	bool snapshot, spill, again, gone;
	snapshot = (spilled != 0);                           /* of a REPEATABLE READ transaction */
	atomic {
		lock == 0 ->
		lock = t + 1; rank[t] = ranks; ranks++;
		txn[t] = RUNNING; xid[t] = nextXID; status[nextXID] = RUNNING; nextXID++
	}
#ifdef SKEW
	if :: ids[t] = 1 :: ids[t] = 2 fi;
#else
	ids[t] = rank[t];
#endif
#ifdef SPILL
	/* must_spill */
#ifdef NO_4
	spill = snapshot;
#else
	spill = (spilled != 0);
#endif
#endif
	if
	:: spill
	:: !spill -> prepare:
		if
		:: atomic {                                      /* arrives, and is answered */
			txn[t] == RUNNING ->
			if
			:: state[t] == NONE -> state[t] = PREPARED; content[t] = truth[t]; stored[t]++; append(EVENT, t)
			:: else ->                                   /* a duplicate */
#ifndef NO_7
				if :: content[t] != truth[t] -> gone = true :: else fi /* other content: refused, and rolled back */
#endif
			fi
		   }
#ifdef SPILL
		:: spill = true                                  /* the platform cannot be reached */
		:: atomic {                                      /* it arrives, and the answer is lost */
			state[t] == NONE -> state[t] = PREPARED; content[t] = 1; stored[t]++; append(EVENT, t); spill = true
		   }
#endif
		:: txn[t] != RUNNING                           /* the database has crashed */
		fi;
#ifdef REUSE
		if
		:: !again && !gone -> again = true; truth[t] = 2; goto prepare /* a retry with the same id, and other content */
		:: true
		fi
#endif
	fi;
	if
	:: atomic {
		txn[t] == RUNNING && !gone ->
		txn[t] = COMMITTED; status[xid[t]] = COMMITTED; flushed = nextXID - 1;
		add(marker, t);
		if :: spill -> add(spilled, t) :: else fi;
		lock = 0
	   }
#ifdef ROLLBACK
	:: atomic { txn[t] == RUNNING -> txn[t] = ABORTED; status[xid[t]] = ABORTED; lock = 0 }  /* or the service dies */
#else
	:: atomic { txn[t] == RUNNING && gone -> txn[t] = ABORTED; status[xid[t]] = ABORTED; lock = 0 }
#endif
	:: txn[t] != RUNNING
	fi;
	if
	:: txn[t] == COMMITTED && !spill ->
		if
		:: atomic {                                      /* Commit: only an accelerator */
			assert(state[t] != ABORTED);
			decide(t, COMMITTED, false);
			if :: state[t] == COMMITTED -> add(acked, t) :: else fi
		   }
#ifndef PROMPT
		:: true                                          /* lost */
#endif
		fi
	:: else
	fi;
	add(over, t)
}

/* Somebody else's transaction: it may be given an xid that was forgotten. */
proctype Stranger() {
	atomic {
		nextXID < XIDS && nextXID <= 2 && status[nextXID] == NONE ->
		status[nextXID] = COMMITTED; nextXID++; flushed = nextXID - 1
	}
}

/* The database crashes once: what runs is gone, and so is every xid that no flushed record mentions. */
proctype DatabaseCrash() {
	byte t, x;
	atomic {
		(txn[0] == RUNNING || txn[1] == RUNNING) ->
		t = 0;
		do
		:: t < N ->
			if :: txn[t] == RUNNING -> txn[t] = ABORTED; status[xid[t]] = ABORTED :: else fi;
			t++
		:: else -> break
		od;
		lock = 0;
		x = flushed + 1;
		do
		:: x < XIDS -> status[x] = NONE; x++
		:: else -> break
		od;
		nextXID = flushed + 1; t = 0; x = 0
	}
}

/* ---- the resolver ---- */

#ifdef NO_1
#define blind wrongView
#define mayAsk true
#else
#define blind false
#define mayAsk (!wrongView)
#endif

#define hasMarker(t) (in(marker, t) && !(blind))
#define ended(t) (status[xid[t]] != RUNNING)
#ifdef NAIVE_XID
#define saysCommitted(t) (status[xid[t]] == COMMITTED)
#define saysAborted(t) (status[xid[t]] == ABORTED)
#else
#define saysCommitted(t) (hasMarker(t))
#ifdef TIMEOUT
#define saysAborted(t) (!hasMarker(t))
#else
#define saysAborted(t) (!hasMarker(t) && ended(t))
#endif
#endif

/* After a failover of the store "ended, not marked" means something only for what is young: an older marker may be gone. */
#ifdef NO_2B
#define trusted(t) true
#else
#define trusted(t) (!failedOver || !in(old, t))
#endif
#define answers(t) (mayAsk && (saysCommitted(t) || saysAborted(t) && trusted(t)))

proctype Resolver() {
	byte t, v;
	do
	:: atomic {                                          /* claims what is in doubt … */
		if
		:: state[0] == PREPARED && answers(0) -> t = 0
		:: state[1] == PREPARED && answers(1) -> t = 1
		fi;
		add(asked, t)
	   };
	   if
	   :: atomic {                                       /* … looks, later, in one snapshot … */
		answers(t) ->
		if :: saysCommitted(t) -> v = COMMITTED :: else -> v = ABORTED fi
	      };
	      atomic { decide(t, v, true); del(asked, t); t = 0; v = 0 } /* … and writes, later still: compare and set */
	   :: atomic { !answers(t) -> del(asked, t); t = 0 }
	   fi
	od
}

proctype WrongView() { wrongView = true; wrongView = false }

/* ---- spill ---- */

proctype Drainer() {
	byte t;
	do
	:: atomic {
		if
		:: in(spilled, 0) && (!in(spilled, 1) || rank[0] < rank[1]) -> t = 0
		:: in(spilled, 1) && (!in(spilled, 0) || rank[1] < rank[0]) -> t = 1
		fi;
		publish(t)
	   };
	   atomic { del(spilled, t); t = 0 }                 /* only after the platform answered */
	od
}

/* ---- clean-up and retention ---- */

#ifdef NO_2A
#define mayDelete(t) (in(acked, t) && in(marker, t))
#else
#define mayDelete(t) (in(acked, t) && in(marker, t) && in(old, t))
#endif

proctype Cleaner() {
	do
	:: atomic { mayDelete(0) -> del(marker, 0) }
	:: atomic { mayDelete(1) -> del(marker, 1) }
	od
}

/* Time passes. A failover may come between an answer and its writing, but not as late as that. */
#ifdef FAILOVER
#define notAsked(t) (!in(asked, t))
#else
#define notAsked(t) true
#endif

proctype Age() {
	do
	:: atomic { in(acked, 0) && !in(old, 0) && notAsked(0) -> add(old, 0) }
	:: atomic { in(acked, 1) && !in(old, 1) && notAsked(1) -> add(old, 1) }
	od
}

/* The store fails over once, and the new one lacks the last decision. Holders begin anew from the checkpoint that it has. */
proctype FailOver() {
	byte t;
	atomic {
		logged > 0 && logK[logged - 1] == COMMIT ->
		t = logT[logged - 1];
		logged--; logT[logged] = 0; logK[logged] = 0;
		state[t] = PREPARED; del(byResolver, t);
		if
		:: cpCursor > logged ->
			cpCursor = logged;
			if :: !in(parked, t) -> add(cpPend, t) :: else fi
		:: else
		fi;
		failedOver = true; leased = false; epoch++; t = 0
	}
	/* What nobody can tell stays in doubt until an operator looks into the source's own records. */
	do
	:: atomic { state[0] == PREPARED && in(old, 0) && !answers(0) -> decide(0, txn[0], true) }
	:: atomic { state[1] == PREPARED && in(old, 1) && !answers(1) -> decide(1, txn[1], true) }
	od
}

/* tx rows of what is published and that nothing in the store refers to. */
#define done(t) (in(out, t) && state[t] == COMMITTED && cpCursor == logged && !in(cpPend | parked | dead, t) && in(over, t))
#ifdef NO_3
#define retained(t) false
#else
#define retained(t) (in(spilled, t))                     /* resolution_retention; what is spilled and older is refused */
#endif

proctype Purge() {
	do
	:: atomic { done(0) && !retained(0) -> state[0] = NONE }
	:: atomic { done(1) && !retained(1) -> state[1] = NONE }
	od
}

/* ---- the relay ---- */

/* Its queue: q0 and q1 are 1 + transaction, 0: none. Some of it are rows, and need no place in the checkpoint. */
#ifdef NO_9
#define headIs(t) (q0 == t + 1 && (q1 == 0 || ids[t] <= ids[1 - t]) || q1 == t + 1 && ids[t] < ids[1 - t])
#else
#define headIs(t) (q0 == t + 1)
#endif
#define queued ((q0 != 0 -> bit(q0 - 1) : 0) | (q1 != 0 -> bit(q1 - 1) : 0))
#define undecided ((known[0] == PREPARED -> 1 : 0) | (known[1] == PREPARED -> 2 : 0))

inline push(t) {
	if :: q0 == 0 -> q0 = t + 1 :: else -> assert(q1 == 0); q1 = t + 1 fi
}

inline pop(t) {
	if :: q0 == t + 1 -> q0 = q1; q1 = 0 :: q1 == t + 1 -> q1 = 0 :: else fi
}

/* Fills the queue with a set, in the order of the log, with the states that tx has now. */
inline fill(set) {
	q0 = 0; q1 = 0; i = 0;
	do
	:: i < logged ->
		if
		:: logK[i] == EVENT && in(set, logT[i]) ->
			push(logT[i]);
			known[logT[i]] = state[logT[i]]
		:: else
		fi;
		i++
	:: else -> break
	od;
	i = 0; set = 0
}

inline forget() {
	cursor = 0; q0 = 0; q1 = 0; flight = 0; known[0] = 0; known[1] = 0; rows = 0; mine = 0; following = false; burying = 0; set = 0
}

#ifdef NO_FENCE
#define holds true
#else
#define holds (mine == epoch)
#endif

/* At most one record of an aggregate is under way. */
#ifdef NO_8
#define ready(t) (known[t] == COMMITTED && !in(flight, t) && !in(burying, t) && (headIs(t) || q1 == t + 1 && known[1 - t] == COMMITTED))
#else
#define ready(t) (known[t] == COMMITTED && flight == 0 && !in(burying, t) && headIs(t))
#endif

proctype Relay(byte me) {
	byte mine, cursor, q0, q1, flight, rows, burying, i, t, set;
	bool following;                                      /* events follow a dead letter of their aggregate */
	byte known[N];
	do
	/* It takes over: what is pending or a row. */
	:: atomic {
		mine == 0 && !leased ->
		leased = true; epoch++; mine = epoch; cursor = cpCursor; rows = parked; following = (dead != 0);
		set = cpPend | parked; fill(set)
	   }

	/* It reads. */
	:: atomic {
		mine != 0 && cursor < logged ->
		t = logT[cursor];
		if
		:: logK[cursor] == EVENT -> known[t] = PREPARED; push(t)
		:: logK[cursor] == COMMIT -> if :: known[t] == PREPARED -> known[t] = COMMITTED :: else fi
		:: else -> if :: known[t] == PREPARED -> known[t] = ABORTED :: else fi
		fi;
		cursor++; t = 0
	   }

	/* An aborted head is dropped. */
	:: atomic { headIs(0) && known[0] == ABORTED -> pop(0) }
	:: atomic { headIs(1) && known[1] == ABORTED -> pop(1) }

	/* A committed head is handed over, or follows the dead letters. */
	:: atomic {
		if :: ready(0) -> t = 0 :: ready(1) -> t = 1 fi;
		if
		:: following -> add(burying, t); pop(t)
		:: else -> add(flight, t); add(net[me], t)
		fi;
		t = 0
	   }

	/* It is acknowledged, or refused for good: then it becomes a dead letter, and so does what follows. */
	:: atomic {
		if :: in(reported[me], 0) -> t = 0 :: in(reported[me], 1) -> t = 1 fi;
		del(reported[me], t);
		if :: in(flight, t) -> del(flight, t); pop(t) :: else fi;
		t = 0
	   }
	:: atomic {
		if :: in(refused[me], 0) -> t = 0 :: in(refused[me], 1) -> t = 1 fi;
		del(refused[me], t);
		if :: in(flight, t) -> del(flight, t); pop(t); add(burying, t); following = true :: else fi;
		t = 0
	   }

#ifndef NO_5
	/* A step: the checkpoint, rows and dead letters in one transaction, under the epoch. What is undecided becomes a row. */
	:: atomic {
		mine != 0 && holds && (cpCursor != cursor || parked != (queued & (rows | undecided)) || cpPend != (queued & ~(rows | undecided)) || burying != 0) ->
		rows = queued & (rows | undecided);
		cpCursor = cursor; parked = rows; cpPend = queued & ~rows; dead = dead | burying; burying = 0
	   }
#else
	/* Two transactions: the checkpoint, and then the rows. */
	:: atomic {
		mine != 0 && holds && (cpCursor != cursor || cpPend != (queued & ~(rows | undecided))) ->
		rows = queued & (rows | undecided);
		cpCursor = cursor; cpPend = queued & ~rows
	   }
	:: atomic { mine != 0 && holds && (parked != (queued & rows) || burying != 0) -> parked = queued & rows; dead = dead | burying; burying = 0 }
#endif
	/* The renewal of its lease tells that it was replaced. */
	:: atomic { mine != 0 && !(holds) -> forget() }

#ifdef REFUSE
#ifndef NO_6
	/* The holder executes an operator's redrive: dead letters become rows, ahead of what is newer. */
	:: atomic {
		redrive && mine != 0 && holds && flight == 0 && burying == 0 && dead != 0 ->
		redrive = false; following = false;
		rows = (queued & rows) | dead; parked = rows; set = queued | dead; dead = 0; fill(set)
	   }
#else
	/* It sees that somebody has taken the dead letters away, and goes on. */
	:: atomic { following && dead == 0 && burying == 0 -> following = false }
#endif
#endif
#ifdef RELAYCRASH
	:: atomic {
		mine != 0 && !crashed ->
		crashed = true; reported[me] = 0; refused[me] = 0;
		if :: net[me] = 0 :: true fi;                    /* what it had handed over is lost, or late */
		if :: holds -> leased = false :: else fi;
		forget()
	   }
#endif
	od
}

/* The lease of a holder that does not know runs out: it is a zombie. */
proctype Expiry() { atomic { leased -> leased = false } }

/* ---- an operator ---- */

proctype Operator() {
	atomic {
		dead != 0 && refuses != 0 ->
		refuses = 0;
#ifdef NO_6
		parked = parked | dead; dead = 0
#else
		redrive = true
#endif
	}
}

/* ---- Kafka ---- */

/* Per aggregate, whatever the topic: nothing committed and older is unpublished. */
#define olderIsMissing(t) (rank[1 - t] < rank[t] && txn[1 - t] == COMMITTED && !in(out, 1 - t))

/* Records arrive in any order: those of one aggregate may go to several topics. Those of a process that is gone arrive late, or
 * never. */
proctype Kafka() {
	byte r, t;
	do
	:: atomic {
		if
		:: in(net[0], 0) -> r = 0; t = 0
		:: in(net[0], 1) -> r = 0; t = 1
		:: in(net[1], 0) -> r = 1; t = 0
		:: in(net[1], 1) -> r = 1; t = 1
		fi;
		del(net[r], t);
		if
		:: in(refuses, t) -> add(refused[r], t)
		:: else ->
			assert(txn[t] == COMMITTED);               /* no phantom */
			assert(!olderIsMissing(t));                  /* order */
			assert(content[t] == truth[t]);              /* what was prepared, nothing else under its id */
			add(out, t); add(reported[r], t)
		fi;
		r = 0; t = 0
	   }
	od
}

/* When nothing can happen any more, everything that is committed is out, and nothing is in doubt or set aside. */
#define missing(t) (txn[t] == COMMITTED && !in(out, t))

proctype Judge() {
	timeout ->
	assert(!missing(0)); assert(!missing(1));            /* no loss */
	assert(state[0] != PREPARED); assert(state[1] != PREPARED);
	assert(dead == 0)
}

init {
	atomic {
#ifdef REFUSE
		refuses = 1;
#endif
		run Service(0); run Service(1); run Relay(0); run Kafka(); run Judge();
#ifndef PROMPT
		run Resolver();
#endif
#ifdef ZOMBIE
		run Relay(1); run Expiry();
#endif
#ifdef DBCRASH
		run DatabaseCrash(); run Stranger();
#endif
#ifdef SPILL
		run Drainer();
#endif
#ifdef WRONGVIEW
		run WrongView();
#endif
#ifdef CLEAN
		run Cleaner(); run Age();
#endif
#ifdef FAILOVER
		run FailOver();
#endif
#ifdef PURGE
		run Purge();
#endif
#ifdef REFUSE
		run Operator();
#endif
	}
}
