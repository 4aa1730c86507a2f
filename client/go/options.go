package lowbit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// Version is the version of this SDK; the user agent names it.
const Version = "0.1.0"

var tokenSyntax = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`) // RFC 6750, section 2.1

// Option changes one option of a client.
type Option func(*options)

type options struct {
	callTimeout, slowCallTimeout, streamTimeout, resumeTimeout time.Duration
	keepaliveInterval, keepaliveTimeout                        time.Duration
	firstBackoff, maxBackoff                                   time.Duration
	maxMessageBytes, maxAttempts, retryBudget                  int
	tls                                                        *TLS
	token                                                      *string
	traceparent                                                func(context.Context) string
}

// TLS says how a connection is secured. All certificates and keys are PEM.
type TLS struct {
	// CA holds the certificates that are trusted; empty takes the system's.
	CA []byte
	// Certificate and Key are what the client shows of itself (mutual TLS); both or none.
	Certificate, Key []byte
	// ServerName is the name to check instead of the address's; empty takes the address's.
	ServerName string
}

// WithCallTimeout sets the deadline of calls with one answer, over all tries, where the
// context has none. Default 30 s.
func WithCallTimeout(d time.Duration) Option { return func(o *options) { o.callTimeout = d } }

// WithSlowCallTimeout sets the same for VerifyModel and Score. Default 600 s.
func WithSlowCallTimeout(d time.Duration) Option { return func(o *options) { o.slowCallTimeout = d } }

// WithStreamTimeout sets the deadline of Generate and Load where the context has none.
// Default: none.
func WithStreamTimeout(d time.Duration) Option { return func(o *options) { o.streamTimeout = d } }

// WithResumeTimeout sets how long WatchJob and Load try to get back to a server. Default 60 s.
func WithResumeTimeout(d time.Duration) Option { return func(o *options) { o.resumeTimeout = d } }

// WithMaxMessageBytes sets the largest message that is sent or accepted. Default 64 MiB.
func WithMaxMessageBytes(n int) Option { return func(o *options) { o.maxMessageBytes = n } }

// WithKeepalive sets the time between two pings (default 30 s, gRPC's least is 10 s) and the
// time after which a connection without an answer is given up (default 10 s).
func WithKeepalive(interval, timeout time.Duration) Option {
	return func(o *options) { o.keepaliveInterval, o.keepaliveTimeout = interval, timeout }
}

// WithMaxAttempts sets the tries of one call in all; 1 switches retries off. Default 4.
func WithMaxAttempts(n int) Option { return func(o *options) { o.maxAttempts = n } }

// WithBackoff sets the wait before the second try, which doubles each time, and its bound.
// Default 100 ms and 2 s.
func WithBackoff(first, max time.Duration) Option {
	return func(o *options) { o.firstBackoff, o.maxBackoff = first, max }
}

// WithRetryBudget sets the retries in a row over all calls; a success gives back a tenth of
// one. Default 20.
func WithRetryBudget(n int) Option { return func(o *options) { o.retryBudget = n } }

// WithTLS secures the connection.
func WithTLS(t TLS) Option { return func(o *options) { o.tls = &t } }

// WithToken sends a bearer token with each call. Without TLS it is only sent to loopback.
func WithToken(token string) Option { return func(o *options) { o.token = &token } }

// WithTraceparent asks f, for each try, for a W3C traceparent to send; empty sends none.
func WithTraceparent(f func(context.Context) string) Option {
	return func(o *options) { o.traceparent = f }
}

func newOptions(address string, changes []Option) (*options, error) {
	o := &options{
		callTimeout: 30 * time.Second, slowCallTimeout: 600 * time.Second,
		resumeTimeout: time.Minute, maxMessageBytes: 64 << 20,
		keepaliveInterval: 30 * time.Second, keepaliveTimeout: 10 * time.Second,
		firstBackoff: 100 * time.Millisecond, maxBackoff: 2 * time.Second,
		maxAttempts: 4, retryBudget: 20,
	}
	for _, change := range changes {
		change(o)
	}
	for name, value := range map[string]time.Duration{
		"call_timeout": o.callTimeout, "slow_call_timeout": o.slowCallTimeout,
		"resume_timeout": o.resumeTimeout, "keepalive_interval": o.keepaliveInterval,
		"keepalive_timeout": o.keepaliveTimeout, "first_backoff": o.firstBackoff,
		"max_backoff": o.maxBackoff,
	} {
		if value <= 0 {
			return nil, fmt.Errorf("lowbit: %s must be above 0", name)
		}
	}
	switch {
	case o.streamTimeout < 0:
		return nil, errors.New("lowbit: stream_timeout must not be below 0")
	case o.maxMessageBytes < 1:
		return nil, errors.New("lowbit: max_message_bytes must be at least 1")
	case o.maxAttempts < 1:
		return nil, errors.New("lowbit: max_attempts must be at least 1")
	case o.retryBudget < 0:
		return nil, errors.New("lowbit: retry_budget must not be below 0")
	case o.token != nil && !tokenSyntax.MatchString(*o.token):
		return nil, errors.New("lowbit: token has other characters than RFC 6750 allows, or none")
	case o.token != nil && o.tls == nil && !isLoopback(address):
		return nil, errors.New("lowbit: token without tls is only sent to loopback")
	}
	return o, nil
}

func (o *options) dial(address string) ([]grpc.DialOption, error) {
	secured := insecure.NewCredentials()
	if o.tls != nil {
		config, err := o.tls.config()
		if err != nil {
			return nil, err
		}
		secured = credentials.NewTLS(config)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(secured),
		grpc.WithUserAgent("lowbit-go/" + Version),
		grpc.WithDisableRetry(), // gRPC's own would hide tries from the budget
		grpc.WithDisableServiceConfig(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: o.keepaliveInterval, Timeout: o.keepaliveTimeout, PermitWithoutStream: true,
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: o.firstBackoff, Multiplier: 2, MaxDelay: o.maxBackoff},
			MinConnectTimeout: 20 * time.Second, // gRPC's default; 0 would be none
		}),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(o.maxMessageBytes), grpc.MaxCallSendMsgSize(o.maxMessageBytes),
		),
	}
	if isLoopback(address) { // a proxy of the environment cannot reach this machine's loopback
		dial = append(dial, grpc.WithNoProxy())
	}
	return dial, nil
}

func (t *TLS) config() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.ServerName}
	if len(t.CA) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(t.CA) {
			return nil, errors.New("lowbit: tls.ca holds no PEM certificate")
		}
	}
	if len(t.Certificate)+len(t.Key) > 0 {
		pair, err := tls.X509KeyPair(t.Certificate, t.Key)
		if err != nil {
			return nil, fmt.Errorf("lowbit: tls.certificate and tls.key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

func defaultAddress() string {
	if address := os.Getenv("LOWBIT_ADDRESS"); address != "" {
		return address
	}
	return "127.0.0.1:50151"
}

func isLoopback(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, _ := net.SplitHostPort(address)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
