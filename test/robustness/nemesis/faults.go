package nemesis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/outbox-platform/outbox/embedded/process"
	"github.com/outbox-platform/outbox/test/robustness/cluster"
	"github.com/outbox-platform/outbox/test/robustness/driver"
)

// Kill points of the product; those of the services begin with "driver." or "client.".
var (
	serverPoints = []string{"writer.before-append", "writer.after-append", "resolver.before-decision", "maintenance.before-truncate"}
	relayPoints  = []string{"relay.before-deliver", "relay.after-ack", "relay.before-step", "relay.after-step", "relay.after-acquire", "relay.after-takeover"}
	driverPoints = []string{"driver.K1", "driver.K2", "driver.K3", "driver.K4", "driver.K5", "driver.K6", "client.after-drain"}
	pythonPoints = driverPoints[:6] // the Python SDK itself has none
)

// Points are all of them.
func Points() []string {
	return append(append(append([]string(nil), serverPoints...), relayPoints...), driverPoints...)
}

// catalogue is everything that can go wrong.
func catalogue() []fault {
	return []fault{
		{"kill-server", []string{"server"}, false, killServer},
		{"kill-both-servers", []string{"server"}, false, killBothServers},
		{"kill-relay", []string{"relay"}, true, killRelay},
		{"kill-driver", []string{"driver"}, false, killDriver},
		{"pause-relay-beyond-lease", []string{"relay"}, true, pauseRelay},
		{"pause-relay-with-records-under-way", []string{"relay", "kafka"}, true, pauseRelayUnderWay},
		{"kill-relay-with-records-under-way", []string{"relay", "kafka"}, true, killRelayUnderWay},
		{"pause-server", []string{"server"}, false, pauseServer},
		{"pause-driver", []string{"driver"}, false, pauseDriver},
		{"kill-at-point-server", []string{"server"}, false, thrice(pointServer)},
		{"kill-at-point-relay", []string{"relay"}, true, thrice(pointRelay)},
		{"kill-at-point-driver", []string{"driver"}, false, thrice(pointDriver)},
		{"cut-link", []string{"link"}, true, cutLink},
		{"reset-link", []string{"link"}, true, resetLink},
		{"slow-link", []string{"link"}, true, slowLink},
		{"narrow-link", []string{"link"}, true, narrowLink},
		{"slice-link", []string{"link"}, true, sliceLink},
		{"half-open-link", []string{"link"}, true, halfOpenLink},
		{"cut-link-in-answer", []string{"link"}, true, cutInAnswer},
		{"partition-relay-from-store", []string{"link", "relay"}, true, partitionRelay},
		{"cut-services-from-platform", []string{"link", "driver"}, false, cutServices},
		{"store-immediate-stop", []string{"store"}, true, storeImmediate},
		{"store-kill", []string{"store"}, true, storeKill},
		{"store-away-beyond-lease", []string{"store"}, true, storeAway},
		{"store-backend-kill", []string{"store"}, true, storeBackend},
		{"store-connections-reset", []string{"store"}, true, storeTerminate},
		{"store-failover", []string{"store"}, true, storeFailover},
		{"store-disk-full", []string{"store"}, true, diskFull},
		{"store-eio", []string{"store"}, true, storeEIO},
		{"store-held-xmin", []string{"store-xmin"}, false, heldXmin},
		{"source-immediate-stop", []string{"source", "driver"}, false, sourceStop},
		{"source-backend-kill", []string{"source"}, false, sourceBackend},
		{"source-failover", []string{"source", "driver"}, false, sourceFailover},
		{"source-crash-xid-reuse", []string{"source", "driver"}, false, xidReuse},
		{"broker-kill", []string{"kafka"}, true, brokerKill},
		{"broker-pause", []string{"kafka"}, true, brokerPause},
		{"broker-pause-long-and-kill-relays", []string{"kafka", "relay"}, true, brokerPauseLong},
		{"broker-leader-move", []string{"kafka"}, true, leaderMove},
		{"broker-topic-error", []string{"kafka"}, true, topicError},
		{"broker-cluster-error", []string{"kafka"}, true, clusterError},
		{"broker-record-error", []string{"kafka"}, true, recordError},
		{"broker-partition-increase", []string{"kafka"}, true, partitionIncrease},
		{"leases-end-early", []string{"relay", "store-clock"}, true, leasesEndEarly},
		{"leases-last-longer", []string{"relay", "store-clock"}, true, leasesLastLonger},
		{"store-clock-forward", []string{"store-clock"}, true, storeClockForward},
		{"store-clock-back", []string{"relay", "store-clock"}, true, storeClockBack},
		{"source-clock-jump", []string{"source-clock"}, false, sourceClock},
		{"rolling-restart", []string{"server", "relay"}, true, rollingRestart},
		{"old-binary-beside-new", []string{"server", "relay"}, true, oldBeside},
	}
}

// Names are those of all faults.
func Names() []string {
	var all []string
	for _, f := range catalogue() {
		all = append(all, f.name)
	}
	return all
}

// Disturbing are the faults that may hold up what is committed: those after which an event may be delivered twice, and those
// of the store.
func Disturbing() map[string]bool {
	all := map[string]bool{}
	for _, f := range catalogue() {
		all[f.name] = f.disturbs || slices.ContainsFunc(f.parts, func(p string) bool { return strings.HasPrefix(p, "store") })
	}
	return all
}

// while is how long a fault lasts.
func (s *stroke) while() time.Duration {
	return time.Duration(500+s.random.IntN(2500)) * time.Millisecond
}

func (s *stroke) server() *cluster.Process { return s.Servers[s.random.IntN(len(s.Servers))] }
func (s *stroke) relay() *cluster.Process  { return s.Relays[s.random.IntN(len(s.Relays))] }
func (s *stroke) driver() *cluster.Driver  { all := s.Drivers(); return all[s.random.IntN(len(all))] }
func (s *stroke) source() *cluster.Source  { return s.Sources[s.random.IntN(len(s.Sources))] }
func (s *stroke) node() int                { return s.random.IntN(s.Brokers.Nodes()) }

func killServer(ctx context.Context, s *stroke) error {
	p := s.server()
	p.Kill()
	pause(ctx, s.while())
	return p.Start(context.WithoutCancel(ctx))
}

func killBothServers(ctx context.Context, s *stroke) error {
	for _, p := range s.Servers {
		p.Kill()
	}
	pause(ctx, s.while())
	return startAll(ctx, s.Servers)
}

func startAll(ctx context.Context, all []*cluster.Process) error {
	var errs []error
	for _, p := range all {
		errs = append(errs, p.Start(context.WithoutCancel(ctx)))
	}
	return errors.Join(errs...)
}

func killRelay(ctx context.Context, s *stroke) error {
	p := s.relay()
	p.Kill()
	pause(ctx, s.while())
	return p.Start(context.WithoutCancel(ctx))
}

// again starts a driver that died under another name and lets it work.
func again(ctx context.Context, d *cluster.Driver) error {
	if err := d.Begin(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	return driver.Give(d.Control, driver.Work)
}

func killDriver(ctx context.Context, s *stroke) error {
	d := s.driver()
	d.Kill()
	pause(ctx, s.while()/2)
	return again(ctx, d)
}

func pauseRelay(ctx context.Context, s *stroke) error {
	p := s.relay()
	p.Freeze()
	defer p.Thaw()
	pause(ctx, cluster.LeaseTTL+time.Second)
	return nil
}

// pauseRelayUnderWay: what the sleeping relay had sent and what its successor sends are written side by side.
func pauseRelayUnderWay(ctx context.Context, s *stroke) error {
	p, node := s.relay(), s.node()
	s.Brokers.Freeze(node)
	pause(ctx, 500*time.Millisecond)
	p.Freeze()
	defer p.Thaw()
	pause(ctx, cluster.LeaseTTL+time.Second/2)
	s.Brokers.Thaw(node)
	pause(ctx, time.Second)
	return nil
}

func killRelayUnderWay(ctx context.Context, s *stroke) error {
	p, node := s.relay(), s.node()
	s.Brokers.Freeze(node)
	defer s.Brokers.Thaw(node)
	pause(ctx, 700*time.Millisecond)
	p.Kill()
	pause(ctx, 300*time.Millisecond)
	return p.Start(context.WithoutCancel(ctx))
}

func pauseServer(ctx context.Context, s *stroke) error {
	p := s.server()
	p.Freeze()
	defer p.Thaw()
	pause(ctx, s.while())
	return nil
}

func pauseDriver(ctx context.Context, s *stroke) error {
	d := s.driver()
	d.Freeze()
	defer d.Thaw()
	pause(ctx, s.while())
	return nil
}

// thrice tries three times, because there are many points; one hit is enough.
func thrice(strike func(context.Context, *stroke) error) func(context.Context, *stroke) error {
	return func(ctx context.Context, s *stroke) error {
		result := errMissed
		for range 3 {
			err := strike(ctx, s)
			if err != nil && !errors.Is(err, errMissed) {
				return err
			}
			if err == nil {
				result = nil
			}
			pause(ctx, 300*time.Millisecond)
		}
		return result
	}
}

// rare are points that are not passed many times a second: how often one is passed at most before it kills, and how long that
// may take.
var rare = map[string]struct {
	passes int
	within time.Duration
}{
	"resolver.before-decision":    {3, 6 * time.Second},
	"maintenance.before-truncate": {1, 6 * time.Second},
	"relay.after-acquire":         {2, cluster.LeaseTTL + 4*time.Second}, // when the lease of the relay that was killed has run out
	"relay.after-takeover":        {2, cluster.LeaseTTL + 4*time.Second},
	"client.after-drain":          {3, 6 * time.Second},
}

// killAt kills a process at a point that it passes soon.
func (s *stroke) killAt(ctx context.Context, p *cluster.Process, point string) error {
	passes, within := 20, 4*time.Second
	if r, ok := rare[point]; ok {
		passes, within = r.passes, r.within
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	if err := p.KillAt(limited, point, 1+s.random.IntN(passes)); err != nil {
		return errMissed
	}
	s.n.hit("point:" + point)
	return nil
}

func pointServer(ctx context.Context, s *stroke) error {
	p := s.server()
	err := s.killAt(ctx, p, serverPoints[s.random.IntN(len(serverPoints))])
	return errors.Join(err, p.Start(context.WithoutCancel(ctx)))
}

func pointRelay(ctx context.Context, s *stroke) error {
	p := s.relay()
	point := relayPoints[s.random.IntN(len(relayPoints))]
	if strings.HasPrefix(point, "relay.after-acquire") || strings.HasPrefix(point, "relay.after-takeover") {
		// Something must be there to be taken over.
		for _, other := range s.Relays {
			if other != p {
				other.Kill()
				defer func() { _ = other.Start(context.WithoutCancel(ctx)) }() // heal says so when it does not
				break
			}
		}
	}
	err := s.killAt(ctx, p, point)
	return errors.Join(err, p.Start(context.WithoutCancel(ctx)))
}

func pointDriver(ctx context.Context, s *stroke) error {
	d := s.driver()
	points := driverPoints
	if d.Python != nil {
		points = pythonPoints
	}
	point := points[s.random.IntN(len(points))]
	if point == "client.after-drain" { // there must be something to drain
		for _, l := range s.Links {
			if strings.HasPrefix(l.Name, "services-") {
				l.Cut()
				defer func() { _ = l.Heal() }() // heal says so when it does not
			}
		}
		pause(ctx, 2*time.Second)
		for _, l := range s.Links {
			if strings.HasPrefix(l.Name, "services-") {
				if err := l.Heal(); err != nil {
					return err
				}
			}
		}
	}
	err := s.killAt(ctx, d.Process, point)
	if d.Alive() {
		return err
	}
	return errors.Join(err, again(ctx, d))
}

func (s *stroke) link() *cluster.Link { return s.Links[s.random.IntN(len(s.Links))] }

// sick makes a link sick for a while.
func (s *stroke) sick(ctx context.Context, make func(*cluster.Link) error) error {
	l := s.link()
	s.n.hit("link:" + l.Name)
	err := make(l)
	pause(ctx, s.while())
	return errors.Join(err, l.Heal())
}

func cutLink(ctx context.Context, s *stroke) error {
	return s.sick(ctx, func(l *cluster.Link) error { l.Cut(); return nil })
}
func resetLink(ctx context.Context, s *stroke) error { return s.sick(ctx, (*cluster.Link).Reset) }
func slowLink(ctx context.Context, s *stroke) error {
	return s.sick(ctx, func(l *cluster.Link) error { return l.Slow(20+s.random.IntN(200), 20) })
}
func narrowLink(ctx context.Context, s *stroke) error {
	return s.sick(ctx, func(l *cluster.Link) error { return l.Narrow(20 + s.random.IntN(200)) })
}
func sliceLink(ctx context.Context, s *stroke) error { return s.sick(ctx, (*cluster.Link).Slice) }
func halfOpenLink(ctx context.Context, s *stroke) error {
	return s.sick(ctx, func(l *cluster.Link) error {
		return l.HalfOpen([]string{"upstream", "downstream", ""}[s.random.IntN(3)])
	})
}
func cutInAnswer(ctx context.Context, s *stroke) error {
	return s.sick(ctx, func(l *cluster.Link) error { return l.CutAfter(500 + s.random.IntN(20_000)) })
}

// partitionRelay: a relay that reaches Kafka and not the store, beyond its lease.
func partitionRelay(ctx context.Context, s *stroke) error {
	p := s.relay()
	for _, l := range s.Links {
		if l.Name == p.Name+"-store" {
			err := l.HalfOpen("")
			pause(ctx, cluster.LeaseTTL+time.Second)
			return errors.Join(err, l.Heal())
		}
	}
	return errCannot
}

// cutServices: no service reaches the platform; they spill.
func cutServices(ctx context.Context, s *stroke) error {
	var errs []error
	for _, l := range s.Links {
		if strings.HasPrefix(l.Name, "services-") {
			l.Cut()
		}
	}
	pause(ctx, s.while())
	for _, l := range s.Links {
		if strings.HasPrefix(l.Name, "services-") {
			errs = append(errs, l.Heal())
		}
	}
	return errors.Join(errs...)
}

func storeImmediate(ctx context.Context, s *stroke) error {
	err := s.Store.Server.StopImmediate(context.WithoutCancel(ctx))
	pause(ctx, s.while()/2)
	return errors.Join(err, s.Store.Server.Restart(context.WithoutCancel(ctx)))
}

func storeKill(ctx context.Context, s *stroke) error {
	s.Store.Server.Kill()
	return s.Store.Server.Restart(context.WithoutCancel(ctx))
}

func storeAway(ctx context.Context, s *stroke) error {
	s.Store.Server.Kill()
	pause(ctx, cluster.LeaseTTL+time.Second)
	return s.Store.Server.Restart(context.WithoutCancel(ctx))
}

// killBackend kills one client's backend: all others of the server are ended by the crash recovery.
func (s *stroke) killBackend(ctx context.Context, p *cluster.Postgres, database string) error {
	pids, err := cluster.Query1[[]int32](ctx, p, database,
		"SELECT coalesce(array_agg(pid), '{}') FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()")
	if err != nil {
		return errMissed // it is away because of another fault
	}
	if len(pids) == 0 {
		return errMissed
	}
	return syscall.Kill(int(pids[s.random.IntN(len(pids))]), syscall.SIGKILL)
}

func storeBackend(ctx context.Context, s *stroke) error {
	return s.killBackend(ctx, s.Store, "outbox")
}

func storeTerminate(ctx context.Context, s *stroke) error {
	if err := s.Store.Exec(ctx, "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"); err != nil {
		return errMissed
	}
	return nil
}

func storeFailover(ctx context.Context, s *stroke) error {
	if s.Store.Timeline > 1 {
		return errCannot // once is enough
	}
	if err := s.Store.Failover(context.WithoutCancel(ctx), time.Second); err != nil {
		return err
	}
	return nil
}

// diskFull fills the store's file system.
func diskFull(ctx context.Context, s *stroke) error {
	if s.StoreDir == "" || s.Store.Timeline > 1 {
		return errCannot
	}
	filler := filepath.Join(s.StoreDir, "filler")
	var left syscall.Statfs_t
	if err := syscall.Statfs(s.StoreDir, &left); err != nil {
		return err
	}
	f, err := os.Create(filler)
	if err != nil {
		return err
	}
	// All but a little: WAL files are made in one piece.
	for chunk := make([]byte, 1<<20); err == nil; {
		_, err = f.Write(chunk)
	}
	_ = f.Close() // it is full
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	pause(ctx, 2*time.Second+s.while())
	if err := os.Remove(filler); err != nil {
		return err
	}
	return s.revive(ctx, s.Store)
}

// revive starts a server again that has given up.
func (s *stroke) revive(ctx context.Context, p *cluster.Postgres) error {
	for range 50 {
		if _, err := cluster.Query1[int](ctx, p, "postgres", "SELECT 1"); err == nil {
			return nil
		}
		select {
		case <-p.Server.Done():
			return p.Server.Restart(context.WithoutCancel(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
	return p.Server.Restart(context.WithoutCancel(ctx))
}

// storeEIO lets an fsync of the store fail: PostgreSQL panics and recovers.
func storeEIO(ctx context.Context, s *stroke) error {
	program, err := exec.LookPath("strace")
	if err != nil {
		return errCannot
	}
	args := []string{"-f", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO:when=" + strconv.Itoa(1+s.random.IntN(30))}
	pids := []string{strconv.Itoa(s.Store.Server.PID())}
	for _, child := range process.Children(s.Store.Server.PID()) {
		pids = append(pids, strconv.Itoa(child.PID()))
	}
	for _, pid := range pids {
		args = append(args, "-p", pid)
	}
	size := process.LogSize(s.Store.Server.LogFile())
	limited, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	command := exec.CommandContext(limited, program, args...) //nolint:gosec // ours
	command.Cancel = func() error { return command.Process.Signal(os.Interrupt) }
	out, _ := command.CombinedOutput() // it is interrupted
	if strings.Contains(string(out), "Operation not permitted") {
		return fmt.Errorf("%w: %s", errCannot, strings.TrimSpace(string(out)))
	}
	if err := s.revive(ctx, s.Store); err != nil {
		return err
	}
	if !strings.Contains(process.LogSince(s.Store.Server.LogFile(), size), "PANIC") {
		return errMissed
	}
	return nil
}

// heldXmin: a foreign transaction with an xid that stays open in the store's database.
func heldXmin(ctx context.Context, s *stroke) error {
	limited, cancel := context.WithTimeout(ctx, time.Second+s.while())
	defer cancel()
	err := s.Store.Exec(limited, "outbox", "CREATE TEMPORARY TABLE held AS SELECT 1 AS n FROM pg_sleep(10)")
	if limited.Err() == nil && err != nil {
		return errMissed
	}
	return nil
}

func sourceStop(ctx context.Context, s *stroke) error {
	p := s.source().Postgres
	err := p.Server.StopImmediate(context.WithoutCancel(ctx))
	pause(ctx, s.while()/2)
	return errors.Join(err, p.Server.Restart(context.WithoutCancel(ctx)))
}

func sourceBackend(ctx context.Context, s *stroke) error {
	src := s.source()
	return s.killBackend(ctx, src.Postgres, src.Database)
}

// sourceFailover: the first source's database fails over, and the operator says that the old primary is gone.
func sourceFailover(ctx context.Context, s *stroke) error {
	src := s.Sources[0]
	if src.Postgres.Timeline > 1 || s.LaggingStandby {
		return errCannot
	}
	if err := src.Postgres.Failover(context.WithoutCancel(ctx), time.Second); err != nil {
		return err
	}
	// What was open on the old primary is not known yet everywhere: the operator says it again a while later.
	for range 3 {
		pause(ctx, time.Second)
		if err := s.fence(context.WithoutCancel(ctx), src); err != nil {
			s.n.say("source failover: %v", err)
		}
	}
	return nil
}

func (s *stroke) fence(ctx context.Context, src *cluster.Source) error {
	return Fence(ctx, s.Cluster, src)
}

// Fence is what an operator does after a source's database failed over.
func Fence(ctx context.Context, c *cluster.Cluster, src *cluster.Source) error {
	_, err := c.Operate(ctx, "", "source", "failover", src.Name, "--timeline", "1", "--reason", "the old primary was killed")
	return err
}

// xidReuse leaves a prepared transaction open in a quiet database, crashes it before anything flushed the transaction's id,
// and lets the next transaction get the same one.
func xidReuse(ctx context.Context, s *stroke) error {
	second := s.Sources[1].Postgres
	var quiet []*cluster.Driver
	for _, src := range s.Sources {
		if src.Postgres == second {
			quiet = append(quiet, src.Drivers...)
		}
	}
	defer func() {
		for _, d := range quiet {
			_ = driver.Give(d.Control, driver.Work) // heal says it again
		}
	}()
	for _, d := range quiet {
		if err := obey(ctx, d, driver.Quiet, 9*time.Second); err != nil {
			return errMissed
		}
	}
	probed := quiet[len(quiet)-1] // a source whose database the servers can ask
	xidFile := probed.Control + ".xid"
	_ = os.Remove(xidFile)
	if err := obey(ctx, probed, driver.Xid, 5*time.Second); err != nil {
		return errMissed
	}
	content, err := os.ReadFile(xidFile)
	if err != nil {
		return errMissed
	}
	xid, err := strconv.ParseInt(string(content), 10, 64)
	if err != nil {
		return err
	}
	second.Server.Kill()
	if err := second.Server.Restart(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	next, err := cluster.Query1[int64](ctx, second, "postgres", "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
	if err != nil || next > xid {
		return errMissed // its id had been flushed
	}
	return nil
}

// obey gives a driver an order and waits until it is carried out.
func obey(ctx context.Context, d *cluster.Driver, order string, within time.Duration) error {
	if err := driver.Give(d.Control, order); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for !driver.Obeyed(d.Control) {
		select {
		case <-limited.Done():
			return limited.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

func brokerKill(ctx context.Context, s *stroke) error {
	node := s.node()
	s.Brokers.Kill(node)
	pause(ctx, s.while()/2)
	return s.Brokers.Restart(context.WithoutCancel(ctx), node)
}

func brokerPause(ctx context.Context, s *stroke) error {
	node := s.node()
	s.Brokers.Freeze(node)
	defer s.Brokers.Thaw(node)
	pause(ctx, s.while())
	return nil
}

// brokerPauseLong: the log grows while nothing is published, and then nobody remembers what was read of it.
func brokerPauseLong(ctx context.Context, s *stroke) error {
	for node := range s.Brokers.Nodes() {
		s.Brokers.Freeze(node)
		defer s.Brokers.Thaw(node)
	}
	pause(ctx, 10*time.Second)
	for _, p := range s.Relays {
		p.Kill()
	}
	return startAll(ctx, s.Relays)
}

func leaderMove(ctx context.Context, s *stroke) error {
	if ok, err := s.Brokers.MoveLeaders(ctx); ok || err != nil {
		return err
	}
	// Real brokers: a leader that goes gives its partitions to the others.
	if s.Brokers.Nodes() == 1 {
		return errCannot
	}
	return brokerKill(ctx, s)
}

func topicOf(s *stroke) string {
	return []string{"things", "notes", cluster.GrowingTopic}[s.random.IntN(3)]
}

// refuse lets produce requests fail for a while.
func (s *stroke) refuse(ctx context.Context, topic string, code int16, n int) error {
	ok, err := s.Brokers.Refuse(ctx, topic, code, n)
	if err != nil || !ok {
		return errors.Join(err, errCannot)
	}
	pause(ctx, s.while())
	return s.Brokers.Forgive(context.WithoutCancel(ctx))
}

// Error codes of Kafka's protocol.
const (
	unknownTopic       = 3
	notLeader          = 6
	timedOut           = 7
	invalidTopic       = 17
	notEnoughReplicas  = 19
	notEnoughAfter     = 20
	topicNotAuthorized = 29
	invalidRecord      = 87
)

func topicError(ctx context.Context, s *stroke) error {
	return s.refuse(ctx, topicOf(s), []int16{unknownTopic, topicNotAuthorized, invalidTopic}[s.random.IntN(3)], 3+s.random.IntN(10))
}

func clusterError(ctx context.Context, s *stroke) error {
	return s.refuse(ctx, "*", []int16{notLeader, timedOut, notEnoughReplicas, notEnoughAfter}[s.random.IntN(4)], 5+s.random.IntN(30))
}

// recordError: Kafka refuses records for good; an operator has to let the aggregates go on.
// A record that is refused is tried once more in a batch of its own: several refusals make one for good.
func recordError(ctx context.Context, s *stroke) error {
	if err := s.refuse(ctx, topicOf(s), invalidRecord, 6+s.random.IntN(10)); err != nil {
		return err
	}
	blocked, err := Redrive(context.WithoutCancel(ctx), s.Cluster)
	s.n.redriven(blocked)
	if err != nil {
		s.n.say("redrive: %v", err)
	}
	return nil
}

// blockedAggregate is one of `outbox aggregate blocked -o json`.
type blockedAggregate struct {
	Source string `json:"source"`
	Type   string `json:"aggregate_type"`
	ID     string `json:"aggregate_id"`
	Cause  string `json:"cause"`
}

// Redrive is what an operator does about blocked aggregates. It returns them.
func Redrive(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	out, err := c.Operate(ctx, "", "aggregate", "blocked", "-o", "json")
	if err != nil {
		return nil, err
	}
	var answer struct {
		Aggregates []blockedAggregate `json:"aggregates"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, fmt.Errorf("blocked aggregates: %w: %s", err, out)
	}
	blocked := slices.DeleteFunc(answer.Aggregates, func(b blockedAggregate) bool { return b.Cause != "record" })
	var names []string
	for _, b := range blocked {
		names = append(names, fmt.Sprintf("%s:%s/%s", b.Source, b.Type, b.ID))
		if _, err := c.Operate(ctx, "", "deadletter", "redrive", b.Source, b.Type, b.ID, "--reason", "the broker is well again"); err != nil {
			return names, err
		}
	}
	return names, nil
}

func partitionIncrease(ctx context.Context, s *stroke) error {
	if s.Grown() >= 4 {
		return errCannot
	}
	if _, err := s.Grow(ctx); err != nil {
		return errMissed
	}
	return nil
}

// leasesEndEarly takes all shards from holders that are well and do not know.
func leasesEndEarly(ctx context.Context, s *stroke) error {
	s.n.jumped()
	if err := s.Store.Exec(ctx, "outbox", "UPDATE outbox.shard SET lease_until = lease_until - interval '10 min' WHERE holder <> ''"); err != nil {
		return errMissed
	}
	return nil
}

// leasesLastLonger: the leases last longer than their holders.
func leasesLastLonger(ctx context.Context, s *stroke) error {
	if err := s.Store.Exec(ctx, "outbox", "UPDATE outbox.shard SET lease_until = lease_until + interval '2 s' WHERE holder <> ''"); err != nil {
		return errMissed
	}
	p := s.relay()
	p.Kill()
	return p.Start(context.WithoutCancel(ctx))
}

const (
	// noticed is how long a server takes to notice that its clock was put.
	noticed = 1200 * time.Millisecond
	// leap is the shortest jump: longer than any lease or pause. The longest is twice that, because what was prepared half an
	// hour before a failover of the store is left to an operator.
	leap = 10 * time.Minute
)

// setClock puts a server's clock so far from the true time. heal puts it right in the end.
func (s *stroke) setClock(ctx context.Context, p *cluster.Postgres, offset time.Duration) error {
	ok, err := p.SetClock(offset)
	if err != nil {
		return err
	}
	if !ok {
		return errCannot
	}
	if p == s.Store {
		s.n.jumped()
		s.n.jumped() // its processes notice one after the other
	}
	pause(ctx, noticed)
	return nil
}

func (s *stroke) leap() time.Duration { return leap + time.Duration(s.random.Int64N(int64(leap))) }

// storeClockForward: the store's clock jumps ahead, and all leases have run out.
func storeClockForward(ctx context.Context, s *stroke) error {
	if err := s.setClock(ctx, s.Store, s.leap()); err != nil {
		return err
	}
	pause(ctx, s.while())
	return s.setClock(ctx, s.Store, 0)
}

// storeClockBack: the store's clock is put back, and a relay dies whose leases reach far into the time that is to come again.
func storeClockBack(ctx context.Context, s *stroke) error {
	p := s.relay()
	if err := s.setClock(ctx, s.Store, s.leap()); err != nil {
		return err
	}
	pause(ctx, s.while())
	p.Kill()
	err := s.setClock(ctx, s.Store, -s.leap())
	pause(ctx, cluster.LeaseTTL)
	return errors.Join(err, s.setClock(ctx, s.Store, 0), p.Start(context.WithoutCancel(ctx)))
}

// sourceClock: the clock of a service's database jumps ahead, back before the true time, and is put right.
func sourceClock(ctx context.Context, s *stroke) error {
	p := s.source().Postgres
	for _, offset := range []time.Duration{s.leap(), -s.leap(), 0} {
		if err := s.setClock(ctx, p, offset); err != nil {
			return err
		}
		pause(ctx, s.while()/2)
	}
	return nil
}

func rollingRestart(ctx context.Context, s *stroke) error {
	var errs []error
	for _, all := range [][]*cluster.Process{s.Servers, s.Relays} {
		for _, p := range all {
			if err := p.Stop(); err != nil {
				s.n.say("rolling restart: %v", err)
			}
			errs = append(errs, p.Start(context.WithoutCancel(ctx)))
		}
	}
	return errors.Join(errs...)
}

// oldBeside runs an earlier version of a server and a relay beside the others for a while.
func oldBeside(ctx context.Context, s *stroke) error {
	if s.Old == "" {
		return errCannot
	}
	server, relay := s.server(), s.relay()
	pair := []*cluster.Process{server, relay}
	for _, program := range []string{s.Old, s.Program} {
		for _, p := range pair {
			if err := p.Stop(); err != nil {
				s.n.say("old binary: %v", err)
			}
			p.Program = program
			if err := p.Start(context.WithoutCancel(ctx)); err != nil {
				return err
			}
		}
		if program == s.Old {
			pause(ctx, 2*time.Second+s.while())
		}
	}
	return nil
}
