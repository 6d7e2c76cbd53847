package kafka

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/outbox-platform/outbox/embedded/cache"
)

// oldestJava is the oldest Java release that runs ApacheVersion.
const oldestJava = 17

// installHint ends every error about a missing program.
const installHint = "install a Java runtime and Maven (Debian, Ubuntu: apt-get install default-jre-headless maven)"

// javaVersionLine is what `java -version` prints: openjdk version "17.0.15" 2025-04-15.
var javaVersionLine = regexp.MustCompile(`version "(\d+)`)

// findJava returns the path of a java that is new enough.
func findJava(ctx context.Context) (string, error) {
	java := "java"
	if home := os.Getenv("JAVA_HOME"); home != "" {
		java = filepath.Join(home, "bin", "java")
	}
	java, err := exec.LookPath(java)
	if err != nil {
		return "", fmt.Errorf("apache kafka needs java ≥ %d: %w: %s", oldestJava, err, installHint)
	}
	out, err := exec.CommandContext(ctx, java, "-version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("run %s -version: %w: %s", java, err, out)
	}
	match := javaVersionLine.FindSubmatch(out)
	if match == nil {
		return "", fmt.Errorf("%s -version does not say its version: %s", java, out)
	}
	if release, err := strconv.Atoi(string(match[1])); err != nil || release < oldestJava {
		return "", fmt.Errorf("apache kafka needs java ≥ %d, %s is %s: %s", oldestJava, java, match[1], installHint)
	}
	return java, nil
}

// fetchJars returns the directory with the broker's jars, resolving them with Maven when they are not cached.
func fetchJars(ctx context.Context, log func(string)) (string, error) {
	dir, err := cache.Fill(ctx, filepath.Join("kafka", ApacheVersion), func(dir string) error {
		maven, err := exec.LookPath("mvn")
		if err != nil {
			return fmt.Errorf("%w: %s", err, installHint)
		}
		log("fetching Apache Kafka " + ApacheVersion + " with Maven (once)")
		pom := filepath.Join(filepath.Dir(dir), "pom.xml")
		if err := os.WriteFile(pom, []byte(brokerPOM), 0o600); err != nil {
			return err
		}
		out, err := exec.CommandContext(ctx, maven, "-B", "-q", "-f", pom,
			"org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies",
			"-DoutputDirectory="+dir, "-DincludeScope=runtime").CombinedOutput()
		if err != nil {
			return fmt.Errorf("mvn: %w: %s", err, strings.TrimSpace(string(out)))
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("fetch Apache Kafka %s: %w", ApacheVersion, err)
	}
	return dir, nil
}

// brokerPOM names what to resolve. Kafka brings no slf4j binding; without one it logs nothing, and nobody can see when it
// is ready.
const brokerPOM = `<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>kafka-broker</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>` + ApacheVersion + `</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
`

// arguments are java's for one of Kafka's programs. The client compiler alone starts faster, and is fast enough for more
// than 100,000 records a second.
func (a *Apache) arguments(n *node, mainClass string, args ...string) []string {
	return append([]string{
		"-Xms" + a.config.Heap, "-Xmx" + a.config.Heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
		"-Dorg.slf4j.simpleLogger.defaultLogLevel=info", "-Dorg.slf4j.simpleLogger.showDateTime=true",
		"-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
		"-cp", filepath.Join(a.jars, "*"), mainClass,
	}, args...)
}

// format prepares a node's data directory unless it has been done.
func (a *Apache) format(ctx context.Context, n *node) error {
	_, err := os.Stat(filepath.Join(n.data(), "meta.properties"))
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	format := exec.CommandContext(ctx, a.java, a.arguments(n, "kafka.tools.StorageTool", "format", "-t", clusterID, "-c", n.properties())...)
	format.Dir = n.dir
	if out, err := format.CombinedOutput(); err != nil {
		return fmt.Errorf("format Kafka node %d: %w: %s", n.index, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// properties is a node's server.properties.
func (a *Apache) properties(n *node) []byte {
	voters := make([]string, len(a.nodes))
	for i, other := range a.nodes {
		voters[i] = fmt.Sprintf("%d@127.0.0.1:%d", i, other.voterTCP)
	}
	told := n.port
	if a.config.Advertise != nil {
		told = a.config.Advertise(n.port)
	}
	replicas, inSync := "1", "1"
	if len(a.nodes) >= 3 {
		replicas, inSync = "3", "2"
	}
	settings := map[string]string{
		"process.roles":                  "broker,controller",
		"node.id":                        strconv.Itoa(n.index),
		"controller.quorum.voters":       strings.Join(voters, ","),
		"listeners":                      fmt.Sprintf("PLAINTEXT://127.0.0.1:%d,CONTROLLER://127.0.0.1:%d", n.port, n.voterTCP),
		"advertised.listeners":           fmt.Sprintf("PLAINTEXT://127.0.0.1:%d", told),
		"inter.broker.listener.name":     "PLAINTEXT",
		"controller.listener.names":      "CONTROLLER",
		"listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
		"log.dirs":                       n.data(),
		"num.partitions":                 strconv.Itoa(DefaultPartitions),
		"auto.create.topics.enable":      "false",
		"default.replication.factor":     replicas,
		"min.insync.replicas":            inSync,
		// Internal topics ask for three replicas each, which a small cluster does not have.
		"offsets.topic.replication.factor":                 replicas,
		"offsets.topic.num.partitions":                     "4",
		"transaction.state.log.replication.factor":         replicas,
		"transaction.state.log.min.isr":                    inSync,
		"transaction.state.log.num.partitions":             "4",
		"share.coordinator.state.topic.replication.factor": replicas,
		"share.coordinator.state.topic.min.isr":            inSync,
		"group.initial.rebalance.delay.ms":                 "0",
		// A killed broker cannot register again before its old session ended: 9 s by default.
		"broker.heartbeat.interval.ms": "500",
		"broker.session.timeout.ms":    "2000",
	}
	maps.Copy(settings, a.config.Settings)
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&text, "%s=%s\n", name, settings[name])
	}
	return []byte(text.String())
}
