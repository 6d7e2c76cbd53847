package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"

	outboxv1 "github.com/outbox-platform/outbox/gen/go/outbox/v1"
)

// sourceFile is a source as people write it.
type sourceFile struct {
	Name              string           `yaml:"name"`
	Topics            []string         `yaml:"topics"`
	RecordProfile     string           `yaml:"record_profile"`
	FailurePolicy     string           `yaml:"failure_policy"`
	CloudEventsSource string           `yaml:"cloudevents_source,omitempty"`
	Databases         []sourceDatabase `yaml:"databases"`
	// Revision makes the change conditional; it is not written by `source get`.
	Revision int64 `yaml:"revision,omitempty"`
}

type sourceDatabase struct {
	Name   string `yaml:"name"`
	Mode   string `yaml:"mode"`
	DSNRef string `yaml:"dsn_ref,omitempty"`
}

const sourceFileHelp = `A file holds one source or several, separated by "---":

  name: orders
  topics: [orders, "orders.*"]      # exact names, or a prefix and "*"
  record_profile: cloudevents       # cloudevents, debezium, huleedu or plain
  failure_policy: block             # what happens to an event that Kafka refuses for good: block, park or skip
  cloudevents_source: /shop/orders  # default: /outbox/ and the name
  databases:
    - name: default
      mode: marker                  # marker, xid-fenced or client-only
      dsn_ref: env:ORDERS_DSN       # where a server finds the DSN of a read-only role; default: the service is asked`

// readSources reads all sources of a file. Unknown keys are errors.
func readSources(r io.Reader) ([]*outboxv1.Source, error) {
	decoder := yaml.NewDecoder(r)
	decoder.KnownFields(true)
	var sources []*outboxv1.Source
	for {
		var f sourceFile
		err := decoder.Decode(&f)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		source, err := f.source()
		if err != nil {
			return nil, fmt.Errorf("source %q: %w", f.Name, err)
		}
		sources = append(sources, source)
	}
	if len(sources) == 0 {
		return nil, errors.New("it holds no source")
	}
	return sources, nil
}

func (f sourceFile) source() (*outboxv1.Source, error) {
	if f.Name == "" {
		return nil, errors.New("name is missing")
	}
	profile, err := enumValue("record_profile", f.RecordProfile, "RECORD_PROFILE_", outboxv1.RecordProfile_value)
	if err != nil {
		return nil, err
	}
	policy, err := enumValue("failure_policy", f.FailurePolicy, "FAILURE_POLICY_", outboxv1.FailurePolicy_value)
	if err != nil {
		return nil, err
	}
	source := &outboxv1.Source{
		Name: f.Name, Topics: f.Topics, RecordProfile: outboxv1.RecordProfile(profile),
		FailurePolicy: outboxv1.FailurePolicy(policy), CloudeventsSource: f.CloudEventsSource, Revision: f.Revision,
	}
	for _, d := range f.Databases {
		mode, err := enumValue("mode", d.Mode, "DATABASE_MODE_", outboxv1.DatabaseMode_value)
		if err != nil {
			return nil, fmt.Errorf("database %q: %w", d.Name, err)
		}
		source.Databases = append(source.Databases, &outboxv1.SourceDatabase{
			Name: d.Name, Mode: outboxv1.DatabaseMode(mode), DsnRef: d.DSNRef,
		})
	}
	return source, nil
}

// enumValue finds the value that a person wrote as "xid-fenced"; empty is unspecified.
func enumValue(key, text, prefix string, values map[string]int32) (int32, error) {
	if text == "" {
		return 0, nil
	}
	name := prefix + strings.ToUpper(strings.ReplaceAll(text, "-", "_"))
	if v, ok := values[name]; ok && v != 0 {
		return v, nil
	}
	var known []string
	for v := int32(1); int(v) < len(values); v++ {
		for n, number := range values {
			if number == v {
				known = append(known, strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(n, prefix), "_", "-")))
			}
		}
	}
	return 0, fmt.Errorf("%s %q is none of %s", key, text, strings.Join(known, ", "))
}

// sourceYAML writes a source so that it can be edited and applied again.
func sourceYAML(s *outboxv1.Source) (string, error) {
	f := sourceFile{
		Name: s.GetName(), Topics: s.GetTopics(),
		RecordProfile:     enumName(s.GetRecordProfile(), "RECORD_PROFILE_"),
		FailurePolicy:     enumName(s.GetFailurePolicy(), "FAILURE_POLICY_"),
		CloudEventsSource: s.GetCloudeventsSource(),
	}
	for _, d := range s.GetDatabases() {
		f.Databases = append(f.Databases, sourceDatabase{
			Name: d.GetName(), Mode: enumName(d.GetMode(), "DATABASE_MODE_"), DSNRef: d.GetDsnRef(),
		})
	}
	var b strings.Builder
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(f); err != nil {
		return "", fmt.Errorf("writing source %s: %w", s.GetName(), err)
	}
	return b.String(), nil
}

// diff shows what changed from before to now, line by line: the longest common subsequence stays.
func diff(before, now string) string {
	a, b := lines(before), lines(now)
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out strings.Builder
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			fmt.Fprintf(&out, "  %s\n", a[i])
			i, j = i+1, j+1
		case i < len(a) && (j == len(b) || common[i+1][j] >= common[i][j+1]):
			fmt.Fprintf(&out, "- %s\n", a[i])
			i++
		default:
			fmt.Fprintf(&out, "+ %s\n", b[j])
			j++
		}
	}
	return out.String()
}

func lines(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(s, "\n"), "\n")
}
