package kafka

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	ck "github.com/confluentinc/confluent-kafka-go/v2/kafka"

	"github.com/outbox-platform/outbox/relay"
)

func TestConfigIsChecked(t *testing.T) {
	good := func() Config { return Config{Brokers: []string{"127.0.0.1:9"}} }
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no brokers given":               func(c *Config) { c.Brokers = nil },
		"is not one host:port":           func(c *Config) { c.Brokers = []string{"a:1,b:2"} },
		"compression":                    func(c *Config) { c.Compression = "brotli" },
		"linger":                         func(c *Config) { c.Linger = -1 },
		"max queued":                     func(c *Config) { c.MaxQueued = -1 },
		"max queued bytes":               func(c *Config) { c.MaxQueuedBytes = -1 },
		"max message bytes":              func(c *Config) { c.MaxMessageBytes = 1 },
		"metadata refresh":               func(c *Config) { c.MetadataRefresh = time.Nanosecond },
		"mock":                           func(c *Config) { c.Properties = map[string]string{"test.mock.num.brokers": "3"} },
		"agree on the partition":         func(c *Config) { c.Properties = map[string]string{"partitioner": "random"} },
		`property "enable.idempotence"`:  func(c *Config) { c.Properties = map[string]string{"enable.idempotence": "false"} },
		`property "acks"`:                func(c *Config) { c.Properties = map[string]string{"acks": "1"} },
		`property "{topic}.acks"`:        func(c *Config) { c.Properties = map[string]string{"{topic}.acks": "1"} },
		"property \"go.delivery.reports": func(c *Config) { c.Properties = map[string]string{"go.delivery.reports": "false"} },
	} {
		c := good()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v", name, err)
		}
		if _, err := New(t.Context(), c); err == nil {
			t.Errorf("%s: New accepts it", name)
		}
	}
}

// TestEveryReservedPropertyExists keeps the list honest: a name that librdkafka does not know protects nothing.
func TestEveryReservedPropertyExists(t *testing.T) {
	for name, why := range reservedProperties {
		if why == "" {
			t.Errorf("%s has no reason", name)
		}
		p, err := ck.NewProducer(&ck.ConfigMap{"bootstrap.servers": "127.0.0.1:9", "log_level": "0", name: "127.0.0.1:9"})
		if err == nil {
			p.Close()
		} else if strings.Contains(err.Error(), "No such configuration property") {
			t.Errorf("librdkafka does not know %s", name)
		}
	}
}

func TestUnknownPropertyIsAnError(t *testing.T) {
	secret := "hunter2"
	_, err := New(t.Context(), Config{Brokers: []string{"127.0.0.1:9"}, Properties: map[string]string{"sasl.passwort": secret}})
	if err == nil || !strings.Contains(err.Error(), "sasl.passwort") || strings.Contains(err.Error(), secret) {
		t.Errorf("error %v", err)
	}
}

func TestUnknownCodes(t *testing.T) {
	for code, want := range map[ck.ErrorCode]verdict{
		12345:  {"ERROR_12345", relay.ClassTopic},
		-99999: {"_ERROR-99999", relay.ClassCluster},
		-1:     {"ERROR_-1", relay.ClassTopic},
	} {
		if got := verdictOf(code); got != want {
			t.Errorf("%d: %+v, want %+v", code, got, want)
		}
	}
	for code, v := range verdicts {
		if v.name == "" || v.class < relay.ClassRecord || v.class > relay.ClassPurged || (code < 0) != strings.HasPrefix(v.name, "_") {
			t.Errorf("%d: %+v", code, v)
		}
	}
}

func TestLevels(t *testing.T) {
	for syslog, want := range map[int]slog.Level{0: slog.LevelError, 3: slog.LevelError, 4: slog.LevelWarn, 5: slog.LevelInfo, 6: slog.LevelInfo, 7: slog.LevelDebug} {
		if got := levelOf(syslog); got != want {
			t.Errorf("%d: %v", syslog, got)
		}
	}
}
