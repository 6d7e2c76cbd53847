package cluster

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/outbox-platform/outbox/embedded/postgres"
)

// Postgres is a PostgreSQL with the links that lead to it. After a failover it is another server.
type Postgres struct {
	Name     string
	Server   *postgres.Server
	Timeline int
	settings map[string]string
	links    []*Link
	set      *links
	retired  []*postgres.Server
	clock    *clock // nil: as the machine's
	env      []string
}

func (s *links) postgres(ctx context.Context, name, dir string, settings map[string]string) (*Postgres, error) {
	var (
		clock *clock
		env   []string
		err   error
	)
	if s.clocks {
		if clock, env, err = newClock(s.dir, name); err != nil {
			return nil, err
		}
	}
	server, err := postgres.Start(ctx, postgres.Config{Dir: dir, Settings: settings, Env: env})
	if err != nil {
		return nil, err
	}
	return &Postgres{Name: name, Server: server, Timeline: 1, settings: settings, set: s, clock: clock, env: env}, nil
}

// SetClock puts its clock so far from the true time. False: it cannot.
func (p *Postgres) SetClock(offset time.Duration) (bool, error) {
	if p.clock == nil {
		return false, nil
	}
	return true, p.clock.set(offset)
}

func local(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// link opens a way to it and returns the DSN of a database through it.
func (p *Postgres) link(from, database string) (*Link, string, error) {
	l, err := p.set.add(from+"-"+p.Name, local(p.Server.Port()))
	if err != nil {
		return nil, "", err
	}
	p.links = append(p.links, l)
	u, err := url.Parse(p.Server.DSN(database))
	if err != nil {
		return nil, "", err
	}
	u.Host = l.Address()
	return l, u.String(), nil
}

// Exec runs a statement directly, without a proxy, on a database.
func (p *Postgres) Exec(ctx context.Context, database, sql string, args ...any) error {
	conn, err := pgx.Connect(ctx, p.Server.DSN(database))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql, args...)
	return err
}

// Query1 asks for one value.
func Query1[T any](ctx context.Context, p *Postgres, database, sql string, args ...any) (v T, err error) {
	conn, err := pgx.Connect(ctx, p.Server.DSN(database))
	if err != nil {
		return v, err
	}
	defer conn.Close(ctx)
	return v, conn.QueryRow(ctx, sql, args...).Scan(&v)
}

// Wait waits until it answers: another fault may have struck it a moment ago.
func (p *Postgres) Wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		_, err := Query1[int](ctx, p, "postgres", "SELECT 1")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer: %w", p.Name, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Standby starts a standby of it, synchronous or not.
func (p *Postgres) Standby(ctx context.Context, synchronous bool) (*postgres.Server, error) {
	if err := p.Wait(ctx); err != nil {
		return nil, err
	}
	standby, err := postgres.StartStandby(ctx, p.Server, "standby", postgres.Config{Settings: p.settings, Env: p.env})
	if err != nil || !synchronous {
		return standby, err
	}
	err = p.Exec(ctx, "postgres", "ALTER SYSTEM SET synchronous_standby_names = 'standby'")
	if err == nil {
		err = p.Exec(ctx, "postgres", "SELECT pg_reload_conf()")
	}
	for err == nil {
		var state string
		if state, err = Query1[string](ctx, p, "postgres", "SELECT coalesce(max(sync_state), '') FROM pg_stat_replication"); state == "sync" {
			return standby, nil
		}
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	_ = standby.Stop(context.WithoutCancel(ctx)) // the error that counts is the other
	return nil, fmt.Errorf("make the standby of %s synchronous: %w", p.Name, err)
}

// Failover makes a synchronous standby, lets it follow for a while, kills the primary, and leads everybody to the standby.
// Nothing that was acknowledged is lost.
func (p *Postgres) Failover(ctx context.Context, follow time.Duration) error {
	standby, err := p.Standby(ctx, true)
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-time.After(follow):
	}
	p.Server.Kill()
	if err := standby.Promote(ctx); err != nil {
		return err
	}
	p.retired = append(p.retired, p.Server)
	p.Server = standby
	p.Timeline++
	for _, l := range p.links {
		if err := l.lead(local(standby.Port())); err != nil {
			return err
		}
	}
	return nil
}

func (p *Postgres) stop(ctx context.Context) {
	for _, s := range append(p.retired, p.Server) {
		_ = s.Stop(ctx) // nobody needs it any more
	}
}
